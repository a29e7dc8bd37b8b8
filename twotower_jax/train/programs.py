"""The compiled step of each stage of a run, and whether the run's settings give one at all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from twotower_jax.kernels import Backends
from twotower_jax.parameters import Params
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.objectives import Documents, Objective
from twotower_jax.train.placement import Placement
from twotower_jax.train.step import StepMetrics, TrainState, abstract_state, make_step

Step = Callable[..., tuple[TrainState, StepMetrics]]


class Programs:
    """The step for blocks of each size, traced once and compiled when it is needed."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        placement: Placement,
        conversational: bool = False,
    ):
        """`conversational`: whether batches say what each token counts, as those of conversations do."""
        self._config, self._objective, self._optimizer, self._placement = config, objective, optimizer, placement
        self._conversational = conversational
        self._jitted: dict[int, Callable] = {}

    def check(self, block_sizes: tuple[int, ...]) -> None:
        """Traces the step for blocks of each size, so that settings that cannot be computed are met before anything is
        written.

        Tracing for the compilation finds its result. Where kernels are named, one that cannot run says so as well.

        Raises:
          ValueError: in one line.
        """
        weights = abstract_state(self._objective, self._optimizer, self._placement.mesh)
        for size in dict.fromkeys(block_sizes):
            try:
                traced = self._trace(size, *weights)
                if self._config.kernels != Backends():
                    with self._placement.in_force():
                        traced.lower()
            except Exception as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                if isinstance(error, ValueError) and len(lines) == 1:
                    raise
                raise ValueError(
                    f"config: these settings give no step in blocks of {size}: {type(error).__name__}: {lines[0]}"
                ) from error

    def compile(self, block_size: int, state: TrainState, frozen: Params) -> jax.stages.Compiled:
        """The step for blocks of this size: `(state, frozen, ids, index, documents) → (state, metrics)`, which consumes
        the state."""
        traced = self._trace(block_size, state, frozen)
        with self._placement.in_force():
            return traced.lower().compile()

    def _trace(self, block_size: int, state: TrainState, frozen: Params) -> jax.stages.Traced:
        config, placement = self._config, self._placement
        if block_size not in self._jitted:
            step = make_step(config, self._objective, self._optimizer, block_size)
            where = None
            if placement.mesh is not None:
                where = jax.tree.map(lambda leaf: leaf.sharding, state), placement.everywhere
            self._jitted[block_size] = jax.jit(step, donate_argnums=0, out_shardings=where)
        shape = (config.batch_size, config.sequence_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement.ids_sharding())
        documents = None
        if config.reset_at_documents or self._conversational:
            told = (jnp.int32, jnp.bool, jnp.float32, jnp.int32)[: 4 if self._conversational else 2]
            documents = Documents(*(jax.ShapeDtypeStruct(shape, dtype, sharding=ids.sharding) for dtype in told))
        with placement.in_force():
            return self._jitted[block_size].trace(state, frozen, ids, placement.index, documents)
