"""A block of each mode: one compiled function from slots to slots, with no round trip to the host inside.

Every function takes `slots`, which it consumes; `alive` (B,) bool, in which the host takes back rows that it has ended;
`seed` () uint32; and `eos` () int32, the token that ends a row, or −1. It returns the slots and what the rows got.
Rows do not depend on each other: each has its own noise level, commits, random keys and end. A loop runs until its
slowest row is done; rows that are done change no more.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from twotower_jax.diffusion import SamplingConfig, noise_level, sample_step
from twotower_jax.generation.slots import Slots, choose, row_keys
from twotower_jax.parameters import Params, bind
from twotower_jax.tower import Cache
from twotower_jax.two_tower import TwoTower


class Trace(NamedTuple):
    """The denoiser's steps of a block. For step k and row b: the block before the step, `xt` (T, B, S), and after it,
    `tokens`; the `confidence` of each position's prediction (T, B, S) float32; the noise level t (T, B); and whether
    the row was still undecided, `active` (T, B)."""

    xt: jax.Array
    tokens: jax.Array
    confidence: jax.Array
    t: jax.Array
    active: jax.Array


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
    sampling: SamplingConfig,
    cache: Cache,
    start: jax.Array,
    active: jax.Array,
    *,
    keys: jax.Array,
    block: jax.Array,
    record: bool,
    token_keys: jax.Array | None = None,
    threshold: jax.Array | None = None,
) -> Denoised:
    """Fills in the mask tokens of `start` (B, S) in at most `steps_per_block` evaluations.

    Args:
      active: (B,) bool; the other rows stay as they are.
      keys: (B,), of the rows. block: (B,) int32, numbers. token_keys, threshold: as in `sample_step`.
    """
    mask_id, steps = model.config.mask_token_id, sampling.steps_per_block
    batch, size = start.shape

    def undecided(xt):
        return jnp.any(xt == mask_id, axis=1) & active

    def keep_going(carry):
        step, xt, *_ = carry
        return (step < steps) & jnp.any(undecided(xt))

    def one_step(carry):
        step, xt, evaluations, finite, trace = carry
        moving = undecided(xt)
        t = noise_level(xt, mask_id)
        logits = model.denoise(xt, t, cache)
        result = sample_step(
            sampling,
            keys,
            xt,
            logits,
            block=block,
            step=step,
            mask_token_id=mask_id,
            token_keys=token_keys,
            threshold=threshold,
        )
        new = jnp.where(moving[:, None], result.xt, xt)
        if record:
            parts = Trace(xt, new, result.confidence, t, moving)
            trace = jax.tree.map(lambda whole, part: whole.at[step].set(part), trace, parts)
        return step + 1, new, evaluations + moving, finite & (result.finite | ~moving), trace

    trace = None
    if record:
        shape = (steps, batch, size)
        blocks = jnp.zeros(shape, jnp.int32)
        trace = Trace(blocks, blocks, jnp.zeros(shape), jnp.zeros(shape[:2]), jnp.zeros(shape[:2], bool))
    counts = jnp.zeros(batch, jnp.int32)
    carry = jnp.int32(0), start, counts, jnp.ones(batch, bool), trace
    return Denoised(*jax.lax.while_loop(keep_going, one_step, carry)[1:])


@functools.partial(jax.jit, static_argnames=("model", "sampling", "record"), donate_argnames="slots")
def diffusion_block(
    params: Params,
    slots: Slots,
    alive: jax.Array,
    seed: jax.Array,
    eos: jax.Array,
    threshold: jax.Array | None = None,
    *,
    model: TwoTower,
    sampling: SamplingConfig,
    record: bool,
) -> tuple[Slots, Emitted]:
    """One block of diffusion: autoregressive over blocks, parallel inside one (arXiv 2606.26493; 2503.09573 for the
    frame).

    The block starts as mask tokens and is denoised; the context tower then reads it to extend its cache, for the rows
    that go on. A row ends with the block that holds `eos` or reaches its limit. `threshold` () float32 replaces that of
    `sampling`.
    """
    model = bind(model, params)
    size = sampling.block_size
    active = slots.active & alive
    masks = jnp.full((active.shape[0], size), model.config.mask_token_id, jnp.int32)
    done = denoise(
        model,
        sampling,
        slots.cache,
        masks,
        active,
        keys=row_keys(seed, slots.number),
        block=slots.count // size,
        record=record,
        threshold=threshold,
    )
    added = jnp.where(active, size, 0)
    count = slots.count + added
    continuing = active & ~jnp.any(done.block == eos, axis=1) & (count < slots.limit)
    cache = jax.lax.cond(
        jnp.any(continuing),
        lambda cache: model.extend(done.block, jnp.where(continuing, size, 0), cache)[1],
        lambda cache: cache,
        slots.cache,
    )
    emitted = Emitted(
        tokens=done.block,
        count=added,
        active=continuing,
        denoiser_evaluations=done.evaluations,
        context_evaluations=continuing.astype(jnp.int32),
        finite=done.finite,
        trace=done.trace,
    )
    return slots.replace(cache=cache, count=count, active=continuing), emitted


@functools.partial(jax.jit, static_argnames=("model", "sampling", "length", "mock"), donate_argnames="slots")
def autoregressive_block(
    params: Params,
    slots: Slots,
    alive: jax.Array,
    seed: jax.Array,
    eos: jax.Array,
    *,
    model: TwoTower,
    sampling: SamplingConfig,
    length: int,
    mock: bool,
) -> tuple[Slots, Emitted]:
    """Up to `length` tokens, one at a time: from the context tower or, with `mock`, from the denoiser as a check of it.

    Mock-AR: the denoiser, causal and without time conditioning, reads the newest token with the context's cache from
    *before* that token; the context tower then reads it too.
    """
    model = bind(model, params)
    active = slots.active & alive
    zeros = jnp.zeros(active.shape, jnp.int32)

    def next_token(carry):
        i, slots, out = carry
        unread, active = slots.token[:, None], slots.active
        if mock:
            logits, cache = model.mock_ar_logits(unread, slots.cache)[:, 0], slots.cache
        else:
            logits, cache = model.extend(unread, active.astype(jnp.int32), slots.cache)
        prediction = choose(sampling, seed, slots.number, slots.count, logits)
        token = jnp.where(active, prediction.tokens, slots.token)
        count = slots.count + active
        continuing = active & (token != eos) & (count < slots.limit)
        if mock:
            _, cache = model.extend(unread, continuing.astype(jnp.int32), cache)
        out = out._replace(
            tokens=out.tokens.at[:, i].set(token),
            count=out.count + active,
            active=continuing,
            denoiser_evaluations=out.denoiser_evaluations + (active & mock),
            context_evaluations=out.context_evaluations + (continuing if mock else active),
            finite=out.finite & (prediction.finite | ~active),
        )
        return i + 1, slots.replace(cache=cache, token=token, count=count, active=continuing), out

    out = Emitted(
        tokens=jnp.zeros((active.shape[0], length), jnp.int32),
        count=zeros,
        active=active,
        denoiser_evaluations=zeros,
        context_evaluations=zeros,
        finite=jnp.ones(active.shape, bool),
    )
    carry = jnp.int32(0), slots.replace(active=active), out
    _, slots, out = jax.lax.while_loop(lambda c: (c[0] < length) & jnp.any(c[1].active), next_token, carry)
    return slots, out
