"""The reverse process: one denoising step of a block, by any of the strategies.

A block starts all masked. At each of up to T steps the denoiser gives logits for the block, every position gets a
prediction (SUBS: never the mask token), and the strategy (strategies/) returns the new block. The block-by-block
frame is BD3-LM's (Arriola et al. 2025, arXiv 2503.09573).

A strategy is a function of one row; `sample_step` maps it over the batch. So a row cannot depend on its neighbors: it
has its own noise level, commits, knobs and stop, and gets what it would get alone.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from twotower_jax.diffusion.prediction import (
    Choice,
    Prediction,
    check_prediction_settings,
    predict,
    predict_rows,
    without_token,
)
from twotower_jax.diffusion.schedules import SCHEDULES
from twotower_jax.diffusion.strategies import Draft, Strategy, make_strategy, per_row

# Knobs that are settings of their own beside `strategy_options`.
_NAMED_KNOBS = ("confidence_threshold", "schedule")


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample a block. Raises ValueError for values out of range and for settings the strategy would ignore.

    block_size            S, tokens in a block; larger than the one trained with, samples collapse
    steps_per_block       T, the most denoiser evaluations that a block may take
    strategy              one of `STRATEGIES`
    confidence_threshold  γ, of strategies that have that knob
    schedule              one of `SCHEDULES`, of strategies that have that knob
    temperature           0 is greedy
    top_k, top_p          filters of the tempered distribution; 0 and 1 turn them off
    strategy_options      any knobs of the strategy, a mapping; kept as sorted pairs without the two above
    """

    block_size: int = 16
    steps_per_block: int = 16
    strategy: str = "confidence"
    confidence_threshold: float = 0.8
    schedule: str = "linear"
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    strategy_options: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        if not (1 <= self.block_size < 2**31 and 1 <= self.steps_per_block < 2**31):
            raise ValueError(
                f"block_size={self.block_size} and steps_per_block={self.steps_per_block} must both be at least 1 and "
                "less than 2**31"
            )
        SCHEDULES[self.schedule]  # An unknown one is said to be that, whether the strategy has the knob or not.
        made = make_strategy(self.strategy, self._options())
        for name in _NAMED_KNOBS:
            object.__setattr__(self, name, getattr(made, name, getattr(SamplingConfig, name)))
        options = {name: getattr(made, name) for name in dict(self.strategy_options) if name not in _NAMED_KNOBS}
        object.__setattr__(self, "strategy_options", tuple(sorted(options.items())))
        check_prediction_settings(self.temperature, self.top_k, self.top_p)

    def _options(self) -> dict[str, Any]:
        """All knobs that were given, and that must be the strategy's."""
        options = dict(self.strategy_options)
        for name in _NAMED_KNOBS:
            value = getattr(self, name)
            if value != getattr(SamplingConfig, name):  # on the class: the default
                if name in options:
                    raise ValueError(f"{name} is given twice: {value!r}, and in strategy_options {options[name]!r}")
                options[name] = value
        return options

    @property
    def rule(self) -> Strategy:
        """The strategy with its knobs."""
        return make_strategy(self.strategy, self._options())

    def without_strategy(self) -> "SamplingConfig":
        """What is left to compile for where the strategy is an argument."""
        defaults = {field.name: field.default for field in fields(self)}
        return replace(self, **{name: defaults[name] for name in ("strategy", "strategy_options", *_NAMED_KNOBS)})


class StepResult(NamedTuple):
    """What one denoising step did to a block.

    xt          (B, S) int32    the block after the step
    committed   (B, S) bool     positions that went from masked to a token in this step
    confidence  (B, S) float32  of each position's prediction in this step; says nothing where xt was not masked before
    finite      (B,)   bool     false where a masked position's logits held a NaN or an infinity: the position stayed
                                masked, even in the last step, and the caller must not go on with the row
    log_probability  (B, S) float32  whose exponential the confidence is
    """

    xt: jax.Array
    committed: jax.Array
    confidence: jax.Array
    finite: jax.Array
    log_probability: jax.Array


def noise_level(xt: Int[Array, "B S"], mask_token_id: int) -> Float[Array, " B"]:
    """t (B,) float32 to condition the denoiser on: the masked fraction of each row of the block xt (B, S).

    The same for every strategy. The schedule's level would be the expectation of this under the posterior, but a row of
    predict_and_noise can be ahead of its schedule (at least one commit per step), and all rows would share it.
    """
    return jnp.mean(xt == mask_token_id, axis=1, dtype=jnp.float32)


def sample_step(
    config: SamplingConfig,
    keys: Key[Array, " B"],
    xt: Int[Array, "B S"],
    logits: Float[Array, "B S V"],
    *,
    block: int | Int[Array, ""] | Int[Array, " B"],
    step: int | Int[Array, ""] | Int[Array, " B"],
    mask_token_id: int,
    token_keys: Key[Array, "B S"] | None = None,
    strategy: Strategy | None = None,
    fixed: Bool[Array, "B S"] | None = None,
    choice: Choice | None = None,
    steps: Int[Array, " B"] | None = None,
) -> StepResult:
    """Takes one denoising step.

    A row without masked positions goes through unchanged, so a batch may go on until its last row is done: after at
    most T steps, if all logits are finite.

    Args:
        config: known when tracing; everything else but mask_token_id may be traced.
        keys: (B,) typed keys, one per row and the same at every step. The row's draws come from its key, its block and
            its step alone.
        xt: (B, S) int32, the mask token where undecided.
        logits: (B, S, V) of any float dtype, the denoiser's for xt.
        block: index of the block in its row, a scalar or (B,).
        step: index of the step in the block, 0 ≤ step < T, a scalar or (B,).
        mask_token_id: the token that marks undecided positions; never predicted.
        token_keys: (B, S) keys from which the tokens are drawn instead, each position's the same at every step: for
            drafts that are to agree with a sample that somebody else draws from the same keys.
        strategy: with knobs () or (B,), in place of the config's, so that other knobs compile nothing.
        fixed: (B, S) bool, positions that were given and that no strategy may change; None for none.
        choice, steps: temperature and filters, and T, of every row (B,), in place of the config's, so that other ones
            compile nothing.

    Raises:
        ValueError: for shapes that do not fit each other or the config.
    """
    batch = xt.shape[0]
    if token_keys is not None and token_keys.shape != xt.shape:
        raise ValueError(f"expected token_keys {xt.shape}, one per position, got {token_keys.shape}")
    if xt.shape != (batch, config.block_size) or logits.shape[:-1] != xt.shape or keys.shape != (batch,):
        raise ValueError(
            f"expected xt (B, {config.block_size}), logits (B, {config.block_size}, V) and keys (B,), "
            f"got {xt.shape}, {logits.shape} and {keys.shape}"
        )

    strategy = per_row(config.rule if strategy is None else strategy, batch)
    fixed = jnp.zeros(xt.shape, bool) if fixed is None else fixed
    block = jnp.broadcast_to(jnp.asarray(block, jnp.int32), (batch,))
    step = jnp.broadcast_to(jnp.asarray(step, jnp.int32), (batch,))

    def keys_of_step(key, block, step):
        return jax.random.split(jax.random.fold_in(jax.random.fold_in(key, block), step))

    of_step = jax.vmap(keys_of_step)(keys, block, step)
    token_keys, commit_keys = of_step[:, 0] if token_keys is None else token_keys, of_step[:, 1]
    if choice is None:
        options = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
        choose = functools.partial(predict, mask_token_id=mask_token_id, **options)
        for _ in range(token_keys.ndim):
            choose = jax.vmap(choose)
        predictions = choose(token_keys, logits)
    else:
        predictions = predict_rows(token_keys, logits, choice, mask_token_id=mask_token_id)

    def step_row(
        commit_key: jax.Array,
        xt: jax.Array,
        logits: jax.Array,
        step: jax.Array,
        prediction: Prediction,
        strategy: Strategy,
        fixed: jax.Array,
        steps: jax.Array | int,
    ) -> StepResult:
        masked = xt == mask_token_id
        draft = Draft(
            xt=xt,
            masked=masked,
            logits=without_token(logits, mask_token_id),
            tokens=prediction.tokens,
            confidence=prediction.confidence,
            key=commit_key,
            step=step,
            steps=steps,
            mask_token_id=mask_token_id,
        )
        new = strategy.new_block(draft)
        # What holds whatever the strategy says: the last step decides all; a block without masks and what was given
        # stay; and a prediction that means nothing is not used.
        new = jnp.where((step >= steps - 1) & (new == mask_token_id), draft.commit(masked), new)
        new = jnp.where(fixed | (masked & ~prediction.finite) | ~jnp.any(masked), xt, new)
        return StepResult(
            xt=new,
            committed=masked & (new != mask_token_id),
            confidence=prediction.confidence,
            log_probability=prediction.log_probability,
            finite=jnp.all(prediction.finite | ~masked),
        )

    if steps is None:  # Known when tracing, to strategies too.
        step_row, steps = functools.partial(step_row, steps=config.steps_per_block), ()
    else:
        steps = (steps,)
    return jax.vmap(step_row)(commit_keys, xt, logits, step, predictions, strategy, fixed, *steps)
