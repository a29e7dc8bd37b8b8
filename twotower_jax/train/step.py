"""The state of training, its optimizer, and the pure functions that a run compiles.

Parameters are split in two by the table. Those that train are float32 master weights with moments beside them, in
`TrainState`; the rest, with neither gradients nor moments, are a separate argument `frozen`, stored in the compute
dtype (but float32 where the table says so).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twotower_jax.diffusion import LossSum
from twotower_jax.kernels.dispatch import platform
from twotower_jax.parameters import Parameter, Params, Path, flatten, parameter_table, unflatten
from twotower_jax.sharding import constrain, stored_sharding
from twotower_jax.train.config import DTYPES, TrainConfig
from twotower_jax.train.objectives import Documents, Losses, NoiseKey, Objective
from twotower_jax.train.placement import place
from twotower_jax.train.schedule import learning_rate

# The noise of validation is the same in every run, so that runs compare.
VALIDATION_SEED = 1


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: () int32, steps made so far.
      params: the trained parameters, float32.
      optimizer: optax's state for them.
    """

    step: jax.Array
    params: Params
    optimizer: Any


class StepMetrics(NamedTuple):
    """What a step reports.

    Attributes:
      losses: sums and counts of the batch.
      loss: () float32, what was minimized.
      grad_norm: () float32, global, before clipping.
      learning_rate: () float32.
      skipped: () bool, whether `loss` or `grad_norm` is not finite, so that parameters and moments stayed as they were.
    """

    losses: Losses
    loss: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    skipped: jax.Array


def tables(objective: Objective) -> tuple[dict[Path, Parameter], dict[Path, Parameter]]:
    """The parameter table of an objective's model, split into trained and frozen."""
    table = parameter_table(objective.model)
    trained = {path: p for path, p in table.items() if p.trainable and objective.is_trained(path)}
    return trained, {path: p for path, p in table.items() if path not in trained}


def split(objective: Objective, params: Params) -> tuple[Params, Params]:
    """All parameters as trained ones, in float32 copies of their own, and frozen ones."""
    trained, frozen = tables(objective)
    dtype = objective.dtype
    flat = flatten(params)
    # Copies: the step donates them, and two towers may have started from the same arrays.
    ours = unflatten({path: jnp.array(flat[path], jnp.float32, copy=True) for path in trained})
    return ours, unflatten({path: flat[path].astype(jnp.float32 if p.float32 else dtype) for path, p in frozen.items()})


def merge(trained: Params, frozen: Params) -> Params:
    """All parameters: the inverse of `split`, dtypes apart."""
    return unflatten(flatten(trained) | flatten(frozen))


def make_optimizer(config: TrainConfig, trained: Mapping[Path, Parameter]) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; weight decay where the table says so."""
    beta1, beta2 = config.adam_betas
    adam = optax.adamw(
        learning_rate(config),
        b1=beta1,
        b2=beta2,
        weight_decay=config.weight_decay,
        mask=unflatten({path: parameter.decay for path, parameter in trained.items()}),
    )
    if config.moments_dtype != "float32":
        adam = _stored_in(DTYPES[config.moments_dtype], adam)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def _stored_in(dtype: jnp.dtype, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer whose float32 state is kept as `dtype` between steps, and computed with in float32."""

    def cast(state, before: jnp.dtype, after: jnp.dtype):
        return jax.tree.map(lambda leaf: leaf.astype(after) if leaf.dtype == before else leaf, state)

    def init(params):
        return cast(inner.init(params), jnp.float32, dtype)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, dtype, jnp.float32), params)
        return updates, cast(state, jnp.float32, dtype)

    return optax.GradientTransformation(init, update)


def initial_state(optimizer: optax.GradientTransformation, trained: Params) -> TrainState:
    """The state before the first step."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=trained, optimizer=optimizer.init(trained))


def abstract_state(
    objective: Objective, optimizer: optax.GradientTransformation, mesh: Mesh | None = None
) -> tuple[TrainState, Params]:
    """Shapes and dtypes of the state and of the frozen parameters and, with a mesh, where they lie on it."""
    trained, frozen = tables(objective)

    def sharding(parameter: Parameter):
        return None if mesh is None else stored_sharding(mesh, parameter.axes, parameter.shape)

    params = unflatten(
        {path: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=sharding(p)) for path, p in trained.items()}
    )
    rest = {
        path: jax.ShapeDtypeStruct(p.shape, jnp.float32 if p.float32 else objective.dtype, sharding=sharding(p))
        for path, p in frozen.items()
    }
    state = jax.eval_shape(lambda p: initial_state(optimizer, p), params)
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())

        def placed(leaf, like=None):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere if like is None else like.sharding)

        # Moments lie where their parameters do.
        moments = optax.tree.map_params(optimizer, placed, state.optimizer, params, transform_non_params=placed)
        state = TrainState(step=placed(state.step), params=params, optimizer=moments)
    return state, unflatten(rest)


def start_state(
    objective: Objective, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh | None = None
) -> tuple[TrainState, Params]:
    """The state before the first step and the frozen parameters, on a mesh if there is one."""
    if mesh is None:
        trained, frozen = split(objective, params)
        return initial_state(optimizer, trained), frozen
    table = parameter_table(objective.model)
    placed = {path: place(a, stored_sharding(mesh, table[path].axes, a.shape)) for path, a in flatten(params).items()}
    trained, frozen = split(objective, unflatten(placed))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(objective, optimizer, mesh)[0])
    return jax.jit(lambda p: initial_state(optimizer, p), out_shardings=shardings)(trained), frozen


def total_loss(objective: Objective, losses: Losses) -> jax.Array:
    """What is minimized: the sum of the means of the objective's terms, by their weights."""
    return sum(weight * losses[term].mean for term, weight in objective.weights.items())


def make_step(
    config: TrainConfig, objective: Objective, optimizer: optax.GradientTransformation, block_size: int
) -> Callable[[TrainState, Params, jax.Array], tuple[TrainState, StepMetrics]]:
    """One step: `(state, frozen, ids (B, L) int32) → (state, metrics)`, pure, to be compiled with the state donated.

    Two more arguments may follow: the rows' numbers (B,) int32 if they are not 0 … B − 1, and the `Documents` that lie
    side by side in `ids` and are not to know of one another.

    Rows are taken in `config.accumulate` parts one after the other, whose gradients add up to those of the whole batch.
    The noise is a function of seed, step and row of the batch alone. A loss or gradient that is not finite never
    reaches the weights: such a step changes nothing but the number of steps made.
    """
    schedule = learning_rate(config)
    stored = tables(objective)[0]

    def gradients_of(params, frozen, examples, counts):
        """Gradients and losses of some rows, as their share of means over `counts`."""

        def loss_fn(trained: Params) -> tuple[jax.Array, Losses]:
            losses = objective.losses_of(merge(trained, frozen), examples, block_size)
            shares = {term: LossSum(losses[term].total, count) for term, count in counts.items()}
            return total_loss(objective, shares), losses

        gradients, losses = jax.grad(loss_fn, has_aux=True)(params)
        return _as_stored(stored, gradients), losses

    def step(
        state: TrainState,
        frozen: Params,
        ids: jax.Array,
        index: jax.Array | None = None,
        documents: Documents | None = None,
    ) -> tuple[TrainState, StepMetrics]:
        index = jnp.arange(ids.shape[0]) if index is None else index
        # The noise is drawn here, once: the denominators and the losses of all parts are of the same examples.
        noise = NoiseKey(config.seed, state.step, index)
        examples = objective.examples(ids, jnp.ones(ids.shape[0], bool), noise, block_size, documents)
        counts = objective.counts(examples)
        if config.accumulate == 1:
            gradients, losses = gradients_of(state.params, frozen, examples, counts)
        else:

            def of_part(part):
                return gradients_of(state.params, frozen, part, counts)

            def add_part(total, part):
                found = of_part(part)
                # Where a sum over devices is added to a sum over parts, XLA's pass that takes the first out of the loop
                # fails (libtpu 0.0.52, while_loop_all_reduce_code_motion). The numbers are the same.
                found = jax.lax.optimization_barrier(found) if platform() == "tpu" else found
                return jax.tree.map(jnp.add, total, found), None

            parts = jax.tree.map(lambda v: _in_parts(v, config.accumulate), examples)
            shapes = jax.eval_shape(of_part, jax.tree.map(lambda v: v[0], parts))
            zeros, no_losses = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
            (gradients, losses), _ = jax.lax.scan(add_part, (_as_stored(stored, zeros), no_losses), parts)
        loss = total_loss(objective, losses)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        grad_norm = optax.tree.norm(gradients)
        skipped = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        # The optimizer counts the updates it made, and takes its rate by that count.
        rate = schedule(optax.tree.get_all_with_path(state.optimizer, "count")[0][1])
        metrics = StepMetrics(losses, loss, grad_norm, rate, skipped)
        # A choice between whole arrays, element by element, which is part of the update's own loop over them.
        old, new = (state.params, state.optimizer), (optax.apply_updates(state.params, updates), optimizer_state)
        params, optimizer_state = jax.tree.map(lambda a, b: jnp.where(skipped, a, b), old, new)
        return TrainState(state.step + 1, params, optimizer_state), metrics

    return step


def _in_parts(rows: jax.Array, count: int) -> jax.Array:
    """(B, …) → (count, B / count, …), every part having rows of every device."""
    return jnp.moveaxis(rows.reshape(-1, count, *rows.shape[1:]), 1, 0)


def _as_stored(table: Mapping[Path, Parameter], params: Params) -> Params:
    """Gradients laid out as the parameters that they are of."""
    flat = flatten(params)
    return unflatten({path: constrain(flat[path], table[path].axes, stored=True) for path in flat})


def make_validation(
    objective: Objective, block_size: int, rows: int | None = None
) -> Callable[[Params, Params, jax.Array, jax.Array, jax.Array], Losses]:
    """`(trained, frozen, ids (B, L), counted (B,) bool, index (B,)) → losses`, those of each row among them.

    The noise is a function of a row's index, 0 … rows − 1, and of `rows` alone; None for B.
    """
    objective = objective.for_validation()

    def validate(
        trained: Params,
        frozen: Params,
        ids: jax.Array,
        counted: jax.Array,
        index: jax.Array,
        documents: Documents | None = None,
    ) -> Losses:
        noise = NoiseKey(VALIDATION_SEED, 0, index, rows)
        return objective.losses(merge(trained, frozen), ids, counted, noise, block_size, documents, validating=True)

    return validate
