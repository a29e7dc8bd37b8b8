"""Group-relative policy optimization (GRPO: Shao et al. 2024, arXiv 2402.03300) of a denoiser.

The policy is what a step does: at each position that it reveals it draws a token from softmax(logits / temperature)
without the mask token, given the block before the step and the context. Which positions a step reveals is taken as
given. That is exact for strategies that decide it without a look at the tokens drawn, such as `posterior`; others, such
as `confidence`, prefer positions where a probable token was drawn, which the log-probabilities do not know of.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from twotower_jax.compiling import jit
from twotower_jax.diffusion.prediction import without_token
from twotower_jax.parameters import Params, bind
from twotower_jax.reinforce.rollouts import Steps
from twotower_jax.train.step import TrainState, merge
from twotower_jax.two_tower import TwoTower

# Keeps the advantages of a group whose rewards hardly differ from being large.
_LEAST_DEVIATION = 1e-4


class Objective(NamedTuple):
    """What is optimized; hashable, so that compiled functions know it.

    Attributes:
      block_size: S. temperature: of sampling, more than 0.
      clip: ε, how far a token's ratio to the policy that sampled it may go before it no longer pays.
      kl: β, what divergence from the policy at the start of the run costs.
    """

    model: TwoTower
    block_size: int
    temperature: float
    clip: float
    kl: float


class Batch(NamedTuple):
    """Steps, and what is known of them before an update.

    Attributes:
      steps: R rows.
      advantage: (R,) float32, of each row's answer.
      old: (R, L) float32, log-probabilities of what was revealed, under the policy that sampled it; 0 elsewhere.
      start: the same under the policy at the start of the run.
    """

    steps: Steps
    advantage: jax.Array
    old: jax.Array
    start: jax.Array


class Sums(NamedTuple):
    """Sums over the tokens of some rows, () float32: the loss, the estimate of the divergence, and how many tokens'
    ratios are clipped."""

    loss: jax.Array
    kl: jax.Array
    clipped: jax.Array


def advantages(rewards: np.ndarray) -> np.ndarray:
    """(groups, G) rewards of answers to the same prompt → (r − mean) / (std + 1e-4) of each group, float32.

    A group whose answers are worth the same teaches nothing: its advantages are 0.
    """
    rewards = np.asarray(rewards, np.float64)
    from_mean = rewards - rewards.mean(axis=1, keepdims=True)
    return (from_mean / (rewards.std(axis=1, keepdims=True) + _LEAST_DEVIATION)).astype(np.float32)


def log_probabilities(objective: Objective, params: Params, steps: Steps) -> Float[Array, "R L"]:
    """log π of the tokens that steps revealed, (R, L) float32, 0 elsewhere. The logits of all positions are there at
    once, (R, L, V) float32."""
    model = bind(objective.model, params)
    states = model.training_states(steps.clean, steps.noisy, steps.t, objective.block_size, steps.start)
    logits = without_token(model.denoiser_head(states.denoiser), model.config.mask_token_id) / objective.temperature
    chosen = jnp.take_along_axis(logits, steps.token[..., None], axis=-1)[..., 0]
    return jnp.where(steps.revealed, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)


def loss_sums(log_p: Float[Array, "R L"], batch: Batch, clip: float, kl: float) -> Sums:
    """Sums over tokens of −min(ρ A, clamp(ρ, 1 − ε, 1 + ε) A) + β (e^Δ − Δ − 1), with ρ = π / π_old, Δ = log π_start −
    log π.

    The last is an estimate of KL(π ‖ π_start) that is never negative and has no bias (Schulman 2020, "Approximating KL
    divergence", k3; eq. 4 of arXiv 2402.03300).
    """
    ratio, advantage = jnp.exp(log_p - batch.old), batch.advantage[:, None]
    free, held = ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage
    away = batch.start - log_p
    divergence = jnp.expm1(away) - away
    loss = kl * divergence - jnp.minimum(free, held)

    def over_tokens(values):
        return jnp.sum(jnp.where(batch.steps.revealed, values, 0.0))

    return Sums(over_tokens(loss), over_tokens(divergence), over_tokens((held < free).astype(jnp.float32)))


@jit(static_argnames="objective")
def score(trained: Params, frozen: Params, steps: Steps, *, objective: Objective) -> jax.Array:
    """`log_probabilities`, compiled."""
    return log_probabilities(objective, merge(trained, frozen), steps)


@jit(static_argnames="objective", donate_argnames=("gradients", "sums"))
def add_gradients(
    trained: Params,
    frozen: Params,
    batch: Batch,
    tokens: jax.Array,
    gradients: Params,
    sums: Sums,
    *,
    objective: Objective,
) -> tuple[Params, Sums]:
    """Gradients and sums so far, and those of some rows: of the mean of the loss over all `tokens` () of an update."""

    def loss_fn(trained: Params) -> tuple[jax.Array, Sums]:
        log_p = log_probabilities(objective, merge(trained, frozen), batch.steps)
        found = loss_sums(log_p, batch, objective.clip, objective.kl)
        return found.loss / tokens, found

    own, found = jax.grad(loss_fn, has_aux=True)(trained)
    return jax.tree.map(jnp.add, (gradients, sums), (own, found))


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames="state")
def update(
    state: TrainState, gradients: Params, *, optimizer: optax.GradientTransformation
) -> tuple[TrainState, jax.Array]:
    """The state after the update, and the gradient's global norm before clipping; one that is not finite changes
    nothing."""
    norm = optax.tree.norm(gradients)
    updates, moments = optimizer.update(gradients, state.optimizer, state.params)
    new = optax.apply_updates(state.params, updates), moments
    params, moments = jax.tree.map(
        lambda a, b: jnp.where(jnp.isfinite(norm), a, b), new, (state.params, state.optimizer)
    )
    return state.replace(step=state.step + 1, params=params, optimizer=moments), norm
