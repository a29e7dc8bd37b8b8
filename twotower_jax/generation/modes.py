"""What a block of each mode is: a draft, made with the denoiser, and a commit, made with the context tower.

    draft(model, slots, call, recipe) → what the denoiser proposes
    commit(model, slots, call, recipe, draft) → the slots after it, and what the rows got

Both are pure functions of bound models; `blocks.py` compiles them, as one function where the towers are together and as
two where they are apart. Rows do not depend on each other: each has its own noise level, commits, random keys and end.
A loop runs until its slowest row is done; rows that are done change no more.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from twotower_jax.cache import Cache
from twotower_jax.diffusion import Prediction, SamplingConfig, Strategy, noise_level, sample_step
from twotower_jax.generation.slots import Slots, choose, ends, row_keys
from twotower_jax.two_tower import TwoTower


class Call(NamedTuple):
    """What the host says with each block.

    Attributes:
      alive: (B,) bool, in which the host takes back rows that it has ended.
      seed: () uint32. eos: (K,) int32, the tokens that end a row, see `slots.end_token_array`.
      strategy: with knobs (B,), in place of the sampling's, so that one compiled function serves all; None in modes
        that generate one token at a time.
      tolerance: () float32, of speculative mode.
    """

    alive: jax.Array
    seed: jax.Array
    eos: jax.Array
    strategy: Strategy | None
    tolerance: jax.Array


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a block is compiled for.

    Attributes:
      mode: one of `settings.MODES`.
      sampling: without its strategy, which is an argument.
      record, routing: keep the denoiser's steps, and with them the experts that it used.
    """

    mode: str
    sampling: SamplingConfig
    record: bool = False
    routing: bool = False


class Trace(NamedTuple):
    """The denoiser's steps of a block. For step k and row b: the block before the step, `xt` (T, B, S), and after it,
    `tokens`; the `confidence` of each position's prediction (T, B, S) float32; the noise level t (T, B); and whether
    the row was still undecided, `active` (T, B). If asked for, the experts of each token, `routing`
    (T, layers with experts, B, S, k) int16, best first."""

    xt: jax.Array
    tokens: jax.Array
    confidence: jax.Array
    t: jax.Array
    active: jax.Array
    routing: jax.Array | None = None


class Emitted(NamedTuple):
    """What the rows got from one call.

    Attributes:
      tokens: (B, K) int32, of which each row's are its first `count` (B,) int32.
      active: (B,) bool, rows that go on.
      denoiser_evaluations, context_evaluations: (B,) int32, passes of each tower that the row needed.
      finite: (B,) bool, False where a row met a logit that is not a number.
      accepted: (B,) int32, how many of the first tokens are a draft's, in speculative mode.
      trace: of the denoiser, if asked for.
    """

    tokens: jax.Array
    count: jax.Array
    active: jax.Array
    denoiser_evaluations: jax.Array
    context_evaluations: jax.Array
    finite: jax.Array
    accepted: jax.Array | None = None
    trace: Trace | None = None


class Denoised(NamedTuple):
    """A block (B, S) without masks, the evaluations (B,) it took, whether all logits were numbers (B,), the steps."""

    block: jax.Array
    evaluations: jax.Array
    finite: jax.Array
    trace: Trace | None


def denoise(
    model: TwoTower,
    recipe: Recipe,
    call: Call,
    cache: Cache,
    start: Int[Array, "B S"],
    active: Bool[Array, " B"],
    *,
    keys: Key[Array, " B"],
    block: Int[Array, " B"],
    token_keys: Key[Array, "B S"] | None = None,
) -> Denoised:
    """Fills in the mask tokens of `start` (B, S) in at most `steps_per_block` evaluations.

    Args:
      active: (B,) bool; the other rows stay as they are.
      keys: (B,), of the rows. block: (B,) int32, numbers. token_keys: as in `sample_step`.
    """
    mask_id, steps = model.config.mask_token_id, recipe.sampling.steps_per_block
    batch = start.shape[0]

    def undecided(xt):
        return jnp.any(xt == mask_id, axis=1) & active

    def keep_going(carry):
        step, xt, *_ = carry
        return (step < steps) & jnp.any(undecided(xt))

    def evaluate(step, xt, moving):
        """The block after a step, whether its logits were numbers, and what happened."""
        t = noise_level(xt, mask_id)
        logits, routing = model.denoise_with_routing(xt, t, cache)
        result = sample_step(
            recipe.sampling,
            keys,
            xt,
            logits,
            block=block,
            step=step,
            mask_token_id=mask_id,
            token_keys=token_keys,
            strategy=call.strategy,
            fixed=start != mask_id,
        )
        new = jnp.where(moving[:, None], result.xt, xt)
        routing = routing.astype(jnp.int16) if recipe.routing and routing is not None else None
        return new, result.finite, Trace(xt, new, result.confidence, t, moving, routing) if recipe.record else None

    def one_step(carry):
        step, xt, evaluations, finite, trace = carry
        moving = undecided(xt)
        new, fine, happened = evaluate(step, xt, moving)
        trace = jax.tree.map(lambda whole, part: whole.at[step].set(part), trace, happened)
        return step + 1, new, evaluations + moving, finite & (fine | ~moving), trace

    shapes = jax.eval_shape(lambda: evaluate(jnp.int32(0), start, active)[2])
    trace = jax.tree.map(lambda part: jnp.zeros((steps, *part.shape), part.dtype), shapes)
    carry = jnp.int32(0), start, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), trace
    return Denoised(*jax.lax.while_loop(keep_going, one_step, carry)[1:])


# Diffusion: autoregressive over blocks, parallel inside one (arXiv 2606.26493; 2503.09573 for the frame).


def diffusion_draft(model: TwoTower, slots: Slots, call: Call, recipe: Recipe) -> Denoised:
    """A block that starts as mask tokens, denoised."""
    size = recipe.sampling.block_size
    masks = jnp.full((slots.active.shape[0], size), model.config.mask_token_id, jnp.int32)
    return denoise(
        model,
        recipe,
        call,
        slots.cache,
        masks,
        slots.active & call.alive,
        keys=row_keys(call.seed, slots.number),
        block=slots.count // size,
    )


def diffusion_commit(
    model: TwoTower, slots: Slots, call: Call, recipe: Recipe, draft: Denoised
) -> tuple[Slots, Emitted]:
    """The context tower reads the block to extend its cache, for the rows that go on. A row ends with the block that
    holds an end token or reaches its limit."""
    size, active = recipe.sampling.block_size, slots.active & call.alive
    added = jnp.where(active, size, 0)
    count = slots.count + added
    continuing = active & ~jnp.any(ends(draft.block, call.eos), axis=1) & (count < slots.limit)
    cache = jax.lax.cond(
        jnp.any(continuing),
        lambda cache: model.extend(draft.block, jnp.where(continuing, size, 0), cache)[1],
        lambda cache: cache,
        slots.cache,
    )
    emitted = Emitted(
        tokens=draft.block,
        count=added,
        active=continuing,
        denoiser_evaluations=draft.evaluations,
        context_evaluations=continuing.astype(jnp.int32),
        finite=draft.finite,
        trace=draft.trace,
    )
    return slots.replace(cache=cache, count=count, active=continuing), emitted


# One token at a time.


def no_draft(model: TwoTower, slots: Slots, call: Call, recipe: Recipe) -> None:
    """AR needs no draft."""
    return None


def mock_draft(model: TwoTower, slots: Slots, call: Call, recipe: Recipe) -> Prediction:
    """The next token from the denoiser as a check of it: causal and without time conditioning, it reads the newest
    token with the context's cache from *before* that token."""
    logits = model.mock_ar_logits(slots.token[:, None], slots.cache)[:, 0]
    return choose(recipe.sampling, call.seed, slots.number, slots.count, logits)


def token_commit(
    model: TwoTower, slots: Slots, call: Call, recipe: Recipe, draft: Prediction | None
) -> tuple[Slots, Emitted]:
    """The next token: the context tower's, or `draft`. The context tower reads the one before."""
    unread, active, cache, mock = slots.token[:, None], slots.active & call.alive, slots.cache, draft is not None
    if not mock:
        logits, cache = model.extend(unread, active.astype(jnp.int32), cache)
        draft = choose(recipe.sampling, call.seed, slots.number, slots.count, logits)
    token = jnp.where(active, draft.tokens, slots.token)
    count = slots.count + active
    continuing = active & ~ends(token, call.eos) & (count < slots.limit)
    if mock:
        # After the denoiser, which reads the keys that are written here: a loop would copy them otherwise.
        unread, _ = jax.lax.optimization_barrier((unread, draft))
        _, cache = model.extend(unread, continuing.astype(jnp.int32), cache)
    emitted = Emitted(
        tokens=token[:, None],
        count=active.astype(jnp.int32),
        active=continuing,
        denoiser_evaluations=(active & mock).astype(jnp.int32),
        context_evaluations=(continuing if mock else active).astype(jnp.int32),
        finite=draft.finite | ~active,
    )
    return slots.replace(cache=cache, token=token, count=count, active=continuing), emitted


def in_a_row(one, slots: Slots, length: int) -> tuple[Slots, Emitted]:
    """Up to `length` blocks of one token each as one: `one` takes slots to slots and what the rows got."""
    batch = slots.active.shape[0]

    def next_token(carry):
        i, slots, out = carry
        slots, new = one(slots)
        out = out._replace(
            tokens=out.tokens.at[:, i].set(new.tokens[:, 0]),
            count=out.count + new.count,
            active=new.active,
            denoiser_evaluations=out.denoiser_evaluations + new.denoiser_evaluations,
            context_evaluations=out.context_evaluations + new.context_evaluations,
            finite=out.finite & new.finite,
        )
        return i + 1, slots, out

    zeros = jnp.zeros(batch, jnp.int32)
    out = Emitted(jnp.zeros((batch, length), jnp.int32), zeros, slots.active, zeros, zeros, jnp.ones(batch, bool))
    carry = jnp.int32(0), slots, out
    _, slots, out = jax.lax.while_loop(lambda c: (c[0] < length) & jnp.any(c[1].active), next_token, carry)
    return slots, out
