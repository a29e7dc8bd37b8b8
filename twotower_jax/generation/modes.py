"""What a block of each mode is: a draft, made with the denoiser, and a commit, made with the context tower.

    draft(model, slots, blocks, call, recipe) → the blocks as far as they are, and what the denoiser proposes
    commit(model, slots, call, recipe, draft) → the slots after it, and what the rows got

Both are pure functions of bound models; `blocks.py` compiles them, as one function where the towers are together and as
two where they are apart. Rows do not depend on each other: each has its own noise level, commits, random keys and end.

The unit is one evaluation of the denoiser. Every row is at its own step of its own block: a call makes evaluations
until enough rows have finished their blocks (`Call.quorum`), the context reads those, and the other rows go on in the
next call where they are.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from twotower_jax.cache import Cache
from twotower_jax.diffusion import SamplingConfig, Strategy, most_probable, noise_level, sample_step
from twotower_jax.generation.slots import (
    Draws,
    Given,
    Said,
    Slots,
    choose,
    constrained,
    ends,
    row_keys,
    said,
)
from twotower_jax.two_tower import TwoTower

# The most evaluations of a call that keeps its steps.
STEPS_PER_TRACE = 16


class Call(NamedTuple):
    """What the host says with each call.

    Attributes:
      alive: (B,) bool, the rows that the call is for, without those that the host has ended.
      draws: what decides their tokens. eos: (B, K) int32, the tokens that end them, see `slots.end_token_array`.
      strategy: with knobs (B,), in place of the sampling's, so that one compiled function serves all; None in modes
        that generate one token at a time.
      steps: (B,) int32, the most evaluations that a block may take. tolerance: (B,) float32, of speculative mode.
      fresh: (B,) bool, the rows that begin a block; the others go on where they are.
      given: what stands in the block already, or in the tokens to come where one is generated at a time. In speculative
        mode S + 1 positions from the newest token on, whose first says nothing.
      quorum: () int32, the call ends as soon as so many rows have finished their blocks.
      most: () int32, and after so many evaluations or tokens at the latest.
      again, held: (B, S) and (B,) bool, positions that are masked again before the call goes on, and rows whose blocks
        are not to be committed yet: of rows whose steps the host looks at (guide.py). None where there is none.
    """

    alive: jax.Array
    draws: Draws
    eos: jax.Array
    strategy: Strategy | None
    steps: jax.Array
    tolerance: jax.Array
    fresh: jax.Array
    given: Given
    quorum: jax.Array
    most: jax.Array
    again: jax.Array | None = None
    held: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a block is compiled for. Everything else is an argument.

    Attributes:
      mode: one of `settings.MODES`. block_size: S; 1 in modes without blocks.
      record, routing: keep the denoiser's steps, and with them the experts that it used.
      alternatives: how many of the most probable tokens to tell of each position.
      context: tell what the context thinks of the tokens of diffusion.
    """

    mode: str
    block_size: int = 1
    record: bool = False
    routing: bool = False
    alternatives: int = 0
    context: bool = False


class Blocks(NamedTuple):
    """The blocks of B rows as far as they are: `xt` (B, S) int32, the mask token where undecided, after `step` (B,)
    int32 evaluations."""

    xt: jax.Array
    step: jax.Array


class Trace(NamedTuple):
    """The denoiser's evaluations of a call. For number k and row b: the block before it, `xt` (T, B, S), and after it,
    `tokens`; the `confidence` of each position's prediction (T, B, S) float32; the noise level t (T, B); the number of
    the step in the row's block, `step` (T, B); and whether the row was still undecided, `active` (T, B). If asked for,
    the experts of each token, `routing` (T, layers with experts, B, S, k) int16, best first."""

    xt: jax.Array
    tokens: jax.Array
    confidence: jax.Array
    t: jax.Array
    step: jax.Array
    active: jax.Array
    routing: jax.Array | None = None


class Revealed(NamedTuple):
    """What the evaluations of a call decided: for each position the number of the step in its block that committed it
    last, from 1, or 0 where none of this call did, `step` (B, S) int32; the `log_probability` (B, S) float32 of its
    token then; and `top` (B, S, N), see `slots.Said`."""

    step: jax.Array
    log_probability: jax.Array
    top: tuple[jax.Array, jax.Array] | None


class Emitted(NamedTuple):
    """What the rows got from one call.

    Attributes:
      said: tokens (B, K), of which each row's are its first `count` (B,) int32, and what was thought of them; in
        diffusion `revealed` tells that.
      denoiser_evaluations, context_evaluations: (B,) int32, passes of each tower that the row needed.
      finite: (B,) bool, False where a row met a logit that is not a number.
      accepted: (B,) int32, how many of the first tokens are a draft's, in speculative mode.
      revealed: what the call decided of the blocks, finished or not. blocks: as they are after it. Where there are any.
      context: (B, S) float32, log-probabilities of the tokens under the context, if asked for.
      trace: of the denoiser, if asked for.
    """

    said: Said
    count: jax.Array
    denoiser_evaluations: jax.Array
    context_evaluations: jax.Array
    finite: jax.Array
    accepted: jax.Array | None = None
    revealed: Revealed | None = None
    blocks: Blocks | None = None
    context: jax.Array | None = None
    trace: Trace | None = None


class Denoised(NamedTuple):
    """Blocks after the evaluations of a call.

    Attributes:
      block: (B, S) int32, without masks where `done` (B,) bool: the rows whose blocks are to be committed.
      evaluations: (B,) int32, that this call made. finite: (B,) bool, whether all logits were numbers.
      revealed, trace: as in `Emitted`.
    """

    block: jax.Array
    done: jax.Array
    evaluations: jax.Array
    finite: jax.Array
    revealed: Revealed
    trace: Trace | None


def denoise(
    model: TwoTower,
    recipe: Recipe,
    call: Call,
    cache: Cache,
    blocks: Blocks,
    given: Given,
    active: Bool[Array, " B"],
    *,
    keys: Key[Array, " B"],
    block: Int[Array, " B"],
    token_keys: Key[Array, "B S"] | None = None,
) -> tuple[Blocks, Denoised]:
    """Fills in the mask tokens of blocks, until `call.quorum` rows have none or `call.most` evaluations are made.

    A row is done when it has no mask left, has made its `call.steps`, or met logits that are no numbers. Rows that are
    done are left to be committed together: none of them before the quorum is there, or nobody is undecided.

    Args:
      given: of the S positions, with which `call.fresh` rows begin.
      active: (B,) bool; the other rows stay as they are.
      keys: (B,), of the rows. block: (B,) int32, numbers. token_keys: as in `sample_step`.
    """
    mask_id, batch, size = model.config.mask_token_id, *blocks.xt.shape
    sampling = SamplingConfig(block_size=size, steps_per_block=size)
    most = jnp.minimum(call.most, STEPS_PER_TRACE) if recipe.record else call.most

    def undecided(blocks, finite):
        return active & finite & jnp.any(blocks.xt == mask_id, axis=1) & (blocks.step < call.steps)

    def enough(moving):
        return ~jnp.any(moving) | (jnp.sum(active & ~moving) >= call.quorum)

    def keep_going(carry):
        made, blocks, _, finite, *_ = carry
        return (made < most) & ~enough(undecided(blocks, finite))

    def evaluate(blocks, moving):
        """The blocks after a step, and what happened."""
        t = noise_level(blocks.xt, mask_id)
        return decide(blocks, moving, t, *model.denoise_with_routing(blocks.xt, t, cache))

    def decide(blocks, moving, t, logits, routing):
        xt, step = blocks
        logits = constrained(logits, given.allowed)
        result = sample_step(
            sampling,
            keys,
            xt,
            logits,
            block=block,
            step=step,
            mask_token_id=mask_id,
            token_keys=token_keys,
            strategy=call.strategy,
            fixed=given.fixed,
            choice=call.draws.choice,
            steps=call.steps,
        )
        new = jnp.where(moving[:, None], result.xt, xt)
        routing = routing.astype(jnp.int16) if recipe.routing and routing is not None else None
        trace = Trace(xt, new, result.confidence, t, step, moving, routing) if recipe.record else None
        top = most_probable(logits, recipe.alternatives, mask_id) if recipe.alternatives else None
        decided = Revealed(jnp.where(result.committed, step[:, None] + 1, 0), result.log_probability, top)
        return Blocks(new, step + moving), result.finite, decided, trace

    def one_step(carry):
        made, blocks, evaluations, finite, revealed, trace = carry
        moving = undecided(blocks, finite)
        blocks, fine, decided, happened = evaluate(blocks, moving)
        trace = jax.tree.map(lambda whole, part: whole.at[made].set(part), trace, happened)
        newly = moving[:, None] & (decided.step > 0)

        def update(old, new):
            return jnp.where(newly.reshape(*newly.shape, *[1] * (old.ndim - 2)), new, old)

        revealed = jax.tree.map(update, revealed, decided)
        return made + 1, blocks, evaluations + moving, finite & (fine | ~moving), revealed, trace

    xt = blocks.xt if call.again is None else jnp.where(call.again, mask_id, blocks.xt)
    begun = Blocks(jnp.where(call.fresh[:, None], given.tokens, xt), jnp.where(call.fresh, 0, blocks.step))
    if recipe.routing:
        *_, decided, happened = jax.eval_shape(evaluate, begun, active)
    else:  # What is decided does not tell how the logits came about, and the model is traced once.
        logits = jax.ShapeDtypeStruct((batch, size, model.config.vocab_size), jnp.float32)
        *_, decided, happened = jax.eval_shape(decide, begun, active, jnp.zeros(batch), logits, None)
    revealed = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), decided)
    trace = jax.tree.map(lambda v: jnp.zeros((STEPS_PER_TRACE, *v.shape), v.dtype), happened)
    carry = jnp.int32(0), begun, jnp.zeros(batch, jnp.int32), jnp.ones(batch, bool), revealed, trace
    _, blocks, evaluations, finite, revealed, trace = jax.lax.while_loop(keep_going, one_step, carry)
    moving = undecided(blocks, finite)
    done = active & ~moving & enough(moving)
    if call.held is not None:
        done &= ~call.held
    return blocks, Denoised(blocks.xt, done, evaluations, finite, revealed, trace)


# Diffusion: autoregressive over blocks, parallel inside one (arXiv 2606.26493; 2503.09573 for the frame).


def diffusion_draft(
    model: TwoTower, slots: Slots, blocks: Blocks, call: Call, recipe: Recipe
) -> tuple[Blocks, Denoised]:
    """Blocks that start as mask tokens, or as what is given, denoised."""
    return denoise(
        model,
        recipe,
        call,
        slots.cache,
        blocks,
        call.given,
        slots.active & call.alive,
        keys=row_keys(call.draws.seed, call.draws.sample),
        block=slots.count // recipe.block_size,
    )


def diffusion_commit(
    model: TwoTower, slots: Slots, call: Call, recipe: Recipe, draft: Denoised
) -> tuple[Slots, Emitted]:
    """The context tower reads the finished blocks to extend its cache, for the rows that go on. A row ends with the
    block that holds an end token or reaches its limit."""
    size, done = recipe.block_size, draft.done
    added = jnp.where(done, size, 0)
    count = slots.count + added
    ended = jnp.any(ends(draft.block, call.eos), axis=1) | (count >= slots.limit)
    continuing = done & draft.finite & ~ended
    # What the context thinks is told of a row's last block, too.
    read = done & draft.finite if recipe.context else continuing

    def extend(cache, last):
        states, cache = model.extend_states(draft.block, jnp.where(read, size, 0), cache)
        if not recipe.context:
            # Nobody asks for the states: what of the last layers the cache does not need is then not computed.
            return cache, last, None
        before = jnp.concatenate([last[:, None], states[:, :-1].astype(last.dtype)], axis=1)
        thought = said(model.context_head(before), draft.block, done, 0).log_probability
        return cache, jnp.where(read[:, None], states[:, -1].astype(last.dtype), last), thought

    def leave(cache, last):
        return cache, last, jnp.zeros(draft.block.shape, jnp.float32) if recipe.context else None

    cache, last, thought = jax.lax.cond(jnp.any(read), extend, leave, slots.cache, slots.last)
    log_probability = jnp.zeros(draft.block.shape, jnp.float32)
    emitted = Emitted(
        said=Said(draft.block, draft.finite, log_probability, None),
        count=added,
        denoiser_evaluations=draft.evaluations,
        context_evaluations=continuing.astype(jnp.int32),
        finite=draft.finite,
        revealed=draft.revealed,
        context=thought,
        trace=draft.trace,
    )
    active = jnp.where(done, continuing, slots.active)
    return slots.replace(cache=cache, count=count, active=active, last=last), emitted


# One token at a time.


def no_draft(model: TwoTower, slots: Slots, call: Call, recipe: Recipe) -> None:
    """AR needs no draft."""
    return None


def mock_draft(model: TwoTower, slots: Slots, call: Call, recipe: Recipe) -> Said:
    """The next token from the denoiser as a check of it: causal and without time conditioning, it reads the newest
    token with the context's cache from *before* that token."""
    logits = model.mock_ar_logits(slots.token[:, None], slots.cache)[:, 0]
    return choose(call.draws, slots.count, logits, call.given, recipe.alternatives)


def token_commit(
    model: TwoTower, slots: Slots, call: Call, recipe: Recipe, draft: Said | None
) -> tuple[Slots, Emitted]:
    """The next token: the context tower's, or `draft`. The context tower reads the one before."""
    unread, active, cache, mock = slots.token[:, None], slots.active & call.alive, slots.cache, draft is not None
    if not mock:
        logits, cache = model.extend(unread, active.astype(jnp.int32), cache)
        draft = choose(call.draws, slots.count, logits, call.given, recipe.alternatives)
    token = jnp.where(active, draft.tokens, slots.token)
    count = slots.count + active
    continuing = active & ~ends(token, call.eos) & (count < slots.limit)
    if mock:
        # After the denoiser, which reads the keys that are written here: a loop would copy them otherwise.
        unread, _ = jax.lax.optimization_barrier((unread, draft))
        _, cache = model.extend(unread, continuing.astype(jnp.int32), cache)
    emitted = Emitted(
        said=jax.tree.map(lambda v: v[:, None], draft._replace(tokens=token)),
        count=active.astype(jnp.int32),
        denoiser_evaluations=(active & mock).astype(jnp.int32),
        context_evaluations=(continuing if mock else active).astype(jnp.int32),
        finite=draft.finite | ~active,
    )
    active = jnp.where(call.alive, continuing, slots.active)
    return slots.replace(cache=cache, token=token, count=count, active=active), emitted


def in_a_row(one, slots: Slots, call: Call, length: int) -> tuple[Slots, Emitted]:
    """Up to `length` blocks of one token each as one, and at most `call.most`.

    Args:
      one: takes slots, and a call that gives the next position alone, to slots and what the rows got.
    """
    place = jnp.int32(0)

    def of(place):
        given = jax.tree.map(lambda v: jax.lax.dynamic_slice_in_dim(v, place, 1, axis=1), call.given)
        return call._replace(given=given)

    def next_token(carry):
        i, slots, out = carry
        slots, new = one(slots, of(i))
        out = out._replace(
            said=jax.tree.map(lambda whole, part: whole.at[:, i].set(part[:, 0]), out.said, new.said),
            count=out.count + new.count,
            denoiser_evaluations=out.denoiser_evaluations + new.denoiser_evaluations,
            context_evaluations=out.context_evaluations + new.context_evaluations,
            finite=out.finite & new.finite,
        )
        return i + 1, slots, out

    _, shapes = jax.eval_shape(one, slots, of(place))

    def empty(v):
        return jnp.zeros((v.shape[0], length, *v.shape[2:]), v.dtype)

    out = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
    out = out._replace(said=jax.tree.map(empty, shapes.said), finite=jnp.ones_like(out.finite))

    def keep_going(carry):
        i, slots, out = carry
        return (i < jnp.minimum(length, call.most)) & jnp.any(slots.active & call.alive & out.finite)

    _, slots, out = jax.lax.while_loop(keep_going, next_token, (place, slots, out))
    return slots, out
