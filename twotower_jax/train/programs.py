"""The compiled step of each stage of a run, and whether the run's settings give one at all."""

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from twotower_jax.compiling import compiler_options
from twotower_jax.kernels import Backends
from twotower_jax.memory import temporaries
from twotower_jax.parameters import Params
from twotower_jax.train.config import TrainConfig
from twotower_jax.train.objectives import Documents, Objective
from twotower_jax.train.placement import Placement
from twotower_jax.train.step import StepMetrics, TrainState, abstract_state, make_step

Step = Callable[..., tuple[TrainState, StepMetrics]]


class Compiled(NamedTuple):
    """A compiled step, and the seconds that compiling took by the clock."""

    step: jax.stages.Compiled
    seconds: float

    @property
    def temporaries(self) -> int | None:
        """Bytes; see `memory.temporaries`."""
        return temporaries(self.step)


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
        self._compiled: dict[int, Compiled] = {}

    @functools.cached_property
    def weights(self) -> tuple[TrainState, Params]:
        """Shapes of the state and of the frozen parameters, and where they lie."""
        return abstract_state(self._objective, self._optimizer, self._placement.mesh)

    def check(self, block_sizes: tuple[int, ...]) -> None:
        """Traces the step for blocks of each size, so that settings that cannot be computed are met before anything is
        written.

        Tracing for the compilation finds its result. Where kernels are named, one that cannot run says so as well.

        Raises:
          ValueError: in one line.
        """
        for size in dict.fromkeys(block_sizes):
            try:
                traced = self._trace(size)
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

    def compile(self, block_size: int) -> Compiled:
        """The step for blocks of this size, compiled once: `(state, frozen, ids, index, documents) → (state, metrics)`,
        which consumes the state.

        Nothing is allocated for it: shapes, and where they lie, are enough.

        Raises:
          ValueError: in one line, if the compiler says that the step does not fit the devices.
        """
        if block_size not in self._compiled:
            started = time.monotonic()
            try:
                with self._placement.in_force():
                    step = self._trace(block_size).lower().compile()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise ValueError(f"the model does not fit: the compiler says {str(error).splitlines()[0]}") from None
            self._compiled[block_size] = Compiled(step, time.monotonic() - started)
        return self._compiled[block_size]

    def _trace(self, block_size: int) -> jax.stages.Traced:
        config, placement = self._config, self._placement
        state, frozen = self.weights
        if block_size not in self._jitted:
            step = make_step(config, self._objective, self._optimizer, block_size)
            where = None
            if placement.mesh is not None:
                where = jax.tree.map(lambda leaf: leaf.sharding, state), placement.everywhere
            self._jitted[block_size] = jax.jit(
                step, donate_argnums=0, out_shardings=where, compiler_options=compiler_options()
            )
        shape = (config.batch_size, config.sequence_length)
        ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=placement.ids_sharding())
        documents = None
        if config.reset_at_documents or self._conversational:
            told = (jnp.int32, jnp.bool, jnp.float32, jnp.int32)[: 4 if self._conversational else 2]
            documents = Documents(*(jax.ShapeDtypeStruct(shape, dtype, sharding=ids.sharding) for dtype in told))
        with placement.in_force():
            return self._jitted[block_size].trace(state, frozen, ids, placement.index, documents)
