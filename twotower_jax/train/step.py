"""The state of training, its optimizer, and the pure functions that a run compiles.

Parameters are split in two by the table. Those that train are float32 master weights with moments beside them, in
`TrainState`; the rest, with neither gradients nor moments, are a separate argument `frozen`, stored in the compute
dtype (but float32 where the table says so).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from twotower_jax.diffusion import LossSum
from twotower_jax.kernels.dispatch import platform
from twotower_jax.kernels.numerics.quantized import Quantized
from twotower_jax.parameters import Parameter, Params, Path, flatten, unflatten
from twotower_jax.sharding import constrain, stored_sharding
from twotower_jax.train.config import DTYPES, TrainConfig
from twotower_jax.train.objectives import ROUTED, Documents, Losses, NoiseKey, Objective
from twotower_jax.train.optimizers import OPTIMIZERS, Averaged, averaged
from twotower_jax.train.placement import place
from twotower_jax.train.schedule import learning_rate

# Names the gradient's noise scale among the losses.
NOISE = "gradient_noise_scale"
# The noise of validation is the same in every run, so that runs compare.
VALIDATION_SEED = 1


@flax.struct.dataclass
class TrainState:
    """What a step changes.

    Attributes:
      step: () int32, steps made so far.
      params: the trained parameters, float32.
      optimizer: optax's state for them.
      balanced: the routers' biases that move by the load of the experts, float32; none by default.
    """

    step: jax.Array
    params: Params
    optimizer: Any
    balanced: Params = flax.struct.field(default_factory=dict)

    @property
    def weights(self) -> Params:
        """All parameters that a step changes."""
        return merge(self.params, self.balanced)

    @property
    def average(self) -> Params | None:
        """The same with an average of those that have gradients, where one is kept."""
        return merge(self.optimizer.average, self.balanced) if isinstance(self.optimizer, Averaged) else None

    def with_weights(self, weights: Params) -> "TrainState":
        """With other such parameters."""
        flat = flatten(weights)
        params, balanced = (unflatten({path: flat[path] for path in flatten(t)}) for t in (self.params, self.balanced))
        return self.replace(params=params, balanced=balanced)


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
    table = objective.table
    trained = {path: p for path, p in table.items() if p.trainable and objective.is_trained(path)}
    return trained, {path: p for path, p in table.items() if path not in trained}


def apart(objective: Objective, frozen: Params) -> tuple[Params, Params]:
    """Parameters without gradients as those that the load of the experts moves, and the rest.

    They are biases of routers that train, if the objective balances any.
    """
    table, flat = tables(objective)[1], flatten(frozen)
    moved = {
        path for path in flat if objective.balance.bias_rate and table[path].balanced and objective.is_trained(path)
    }
    balanced, rest = ({path: flat[path] for path in flat if (path in moved) == side} for side in (True, False))
    return unflatten(balanced), unflatten(rest)


def split(objective: Objective, params: Params) -> tuple[Params, Params]:
    """All parameters as trained ones, in float32 copies of their own, and frozen ones."""
    trained, frozen = tables(objective)
    flat = flatten(params)

    def stored(path: Path, parameter: Parameter) -> jax.Array | Quantized:
        array = flat[path]
        return array if isinstance(array, Quantized) else array.astype(objective.frozen(parameter).dtype)

    # Copies: the step donates them, and two towers may have started from the same arrays.
    ours = unflatten({path: jnp.array(flat[path], jnp.float32, copy=True) for path in trained})
    return ours, unflatten({path: stored(path, p) for path, p in frozen.items()})


def merge(trained: Params, frozen: Params) -> Params:
    """All parameters: the inverse of `split`, dtypes apart."""
    return unflatten(flatten(trained) | flatten(frozen))


def make_optimizer(config: TrainConfig, trained: Mapping[Path, Parameter]) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer named, with an average of the weights if one is wanted."""
    named = OPTIMIZERS[config.optimizer](config, trained)
    if config.moments_dtype != "float32":
        named = _stored_in(DTYPES[config.moments_dtype], named)
    optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), named)
    return averaged(config.ema_decay, optimizer) if config.ema_decay else optimizer


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


def initial_state(
    optimizer: optax.GradientTransformation, trained: Params, balanced: Params | None = None
) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), balanced or {})


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

    def stored(parameter: Parameter) -> jax.ShapeDtypeStruct | Quantized:
        # A quantized matrix is two arrays, each divided as its own shape allows.
        return jax.tree.map(
            lambda v: jax.ShapeDtypeStruct(
                v.shape, v.dtype, sharding=sharding(dataclasses.replace(parameter, shape=v.shape))
            ),
            objective.frozen(parameter),
        )

    rest = {path: stored(p) for path, p in frozen.items()}
    balanced, rest = apart(objective, unflatten(rest))
    state = jax.eval_shape(lambda *p: initial_state(optimizer, *p), params, balanced)
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())

        def placed(leaf, like=None):
            if _is_masked(leaf):  # The parameter is another optimizer's.
                return leaf
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere if like is None else like.sharding)

        # Moments lie where their parameters do.
        trees = state.optimizer, params
        moments = optax.tree.map_params(optimizer, placed, *trees, transform_non_params=placed, is_leaf=_is_masked)
        state = TrainState(placed(state.step), params, moments, balanced)
    return state, rest


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def start_state(
    objective: Objective, optimizer: optax.GradientTransformation, params: Params, mesh: Mesh | None = None
) -> tuple[TrainState, Params]:
    """The state before the first step and the frozen parameters, on a mesh if there is one."""
    if mesh is None:
        trained, frozen = split(objective, params)
        balanced, frozen = apart(objective, frozen)
        return initial_state(optimizer, trained, jax.tree.map(jnp.copy, balanced)), frozen
    table = objective.table

    def placed_as(path: Path, value: jax.Array | Quantized) -> jax.Array | Quantized:
        return jax.tree.map(lambda v: place(v, stored_sharding(mesh, table[path].axes, v.shape)), value)

    placed = {path: placed_as(path, value) for path, value in flatten(params).items()}
    trained, frozen = split(objective, unflatten(placed))
    balanced, frozen = apart(objective, frozen)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(objective, optimizer, mesh)[0])
    return jax.jit(lambda *p: initial_state(optimizer, *p), out_shardings=shardings)(trained, balanced), frozen


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
    reaches the weights: such a step changes nothing but the number of steps made. Biases of routers that are balanced
    move after the step, by the tokens of the whole batch.
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
        frozen = merge(state.balanced, frozen)
        if config.accumulate == 1:
            gradients, losses = gradients_of(state.params, frozen, examples, counts)
        else:

            def of_part(part):
                return gradients_of(state.params, frozen, part, counts)

            def with_square(gradients, losses):
                if not config.gradient_noise_scale:
                    return gradients, losses
                square = jnp.square(optax.tree.norm(gradients))
                return gradients, losses | {NOISE: LossSum(square, jnp.zeros_like(square))}

            def add_part(total, part):
                found = with_square(*of_part(part))
                # Where a sum over devices is added to a sum over parts, XLA's pass that takes the first out of the loop
                # fails (libtpu 0.0.52, while_loop_all_reduce_code_motion). The numbers are the same.
                found = jax.lax.optimization_barrier(found) if platform() == "tpu" else found
                return jax.tree.map(jnp.add, total, found), None

            parts = jax.tree.map(lambda v: _in_parts(v, config.accumulate), examples)
            shapes = jax.eval_shape(lambda part: with_square(*of_part(part)), jax.tree.map(lambda v: v[0], parts))
            zeros, no_losses = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
            (gradients, losses), _ = jax.lax.scan(add_part, (_as_stored(stored, zeros), no_losses), parts)
        routed = losses.pop(ROUTED, None)
        loss = total_loss(objective, losses)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        grad_norm = optax.tree.norm(gradients)
        if config.gradient_noise_scale:
            losses[NOISE] = noise_scale(grad_norm**2, losses[NOISE].total, ids.shape[0], config.accumulate)
        skipped = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        # The optimizer counts the updates it made, and takes its rate by that count.
        rate = schedule(optax.tree.get_all_with_path(state.optimizer, "count")[0][1])
        metrics = StepMetrics(losses, loss, grad_norm, rate, skipped)
        # A choice between whole arrays, element by element, which is part of the update's own loop over them.
        old = state.params, state.optimizer, state.balanced
        balanced = _moved(objective.balance.bias_rate, state.balanced, routed) if state.balanced else {}
        new = optax.apply_updates(state.params, updates), optimizer_state, balanced
        return TrainState(state.step + 1, *jax.tree.map(lambda a, b: jnp.where(skipped, a, b), old, new)), metrics

    return step


def noise_scale(whole: jax.Array, parts: jax.Array, batch_size: int, count: int) -> LossSum:
    """How many sequences a batch takes until more of them make its gradient little better: tr Σ / |G|².

    Both are estimated without bias from gradients over batches of two sizes, each noisy: of the batch and of its parts
    (McCandlish et al. 2018, arXiv 1812.06162, appendix A.1). They are averaged over steps before they are divided, as
    sum and count of a `LossSum` are.

    Args:
      whole: () float32, |gradient|² of the batch.
      parts: () float32, the sum of |gradient|² of its parts, each a share of the batch's gradient.
      count: of the parts, equally many sequences each.
    """
    small, each = count * parts, batch_size / count  # |count · gradient|², on average over the parts
    squared = (batch_size * whole - each * small) / (batch_size - each)
    trace = (small - whole) / (1 / each - 1 / batch_size)
    return LossSum(trace, squared)


def _moved(rate: float, biases: Params, routed: LossSum) -> Params:
    """Biases after a step: + rate where an expert had fewer tokens than the mean of its layer, − rate where it had
    more."""
    tokens, means = flatten(routed.total), flatten(routed.count)
    return unflatten(
        {path: bias + rate * jnp.sign(means[path] - tokens[path]) for path, bias in flatten(biases).items()}
    )


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
