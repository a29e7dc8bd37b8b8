"""Speculative decoding: the denoiser drafts a block, one context pass decides how much of it AR would have said.

The first token g of a block is given: the newest one, chosen by AR and not yet read. The denoiser fills in the others,
d_1 … d_{S-1}. The context tower reads g, d_1, …, d_{S-1} in one pass, the one that is needed anyway to extend its
cache, and its logits say what AR chooses after each: y_0, …, y_{S-1}. Drafts are kept as long as d_{j+1} = y_j; with a
of them kept the block gives y_0 … y_a, a + 1 tokens, and y_a is the next block's g. The cache keeps g, d_1, …, d_a:
keys are counted, and the Mamba states advanced by a + 1 tokens (`TwoTower.keep`).

**Why it is exact.** AR's token number n is a function y(n, prefix) of the tokens before it: the argmax of its logits,
or at a temperature the argmax of its filtered logits plus Gumbel noise that is a function of seed, row and n alone
(`slots.choose`, which mode "ar" calls with the same arguments). Every token given out here is y(n, prefix) at the
prefix given out before it: for an accepted draft because it was compared with it, for the last one by construction. So,
by induction over n, the output is AR's own, token for token, whatever was drafted. A draft decides only how many tokens
a pass gives. The distribution is AR's for the same reason, and this is rejection sampling with a point mass for the
proposal: given the prefix, a draft d that does not look at the noise of its position is accepted with probability
p(y = d) = p_AR(d), and a rejected one is replaced by a sample of p_AR(· | ≠ d).

A draft may look at that noise, because the output does not depend on the draft. So the denoiser chooses its tokens with
the very noise with which AR will choose (a maximal-coupling argument: Daliri, Musco & Suresh 2024, arXiv 2408.07978).
If both towers gave one distribution, every draft would be accepted; with distributions that differ by a total variation
v, at least (1 − v) / (1 + v) of the drafts are, against 1 − v for the best possible coupling.

The proof takes logits to be the same numbers whether the context reads tokens one at a time or a block at once. They
agree up to rounding, so that a near tie, of two tokens within about 1e-5 in float32, may fall either way.

**Tolerance** τ > 0 gives the guarantee up: d_{j+1} ≠ y_j is kept too if AR's probability of it, neither tempered nor
filtered, is more than 1 − τ times that of AR's most probable token. At 1 every draft is kept, and only one token a
block is AR's.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from twotower_jax.generation.modes import Blocks, Call, Denoised, Emitted, Recipe, denoise
from twotower_jax.generation.slots import Slots, choose, constrained, ends, next_keys, row_keys, said
from twotower_jax.two_tower import TwoTower


def draft(model: TwoTower, slots: Slots, blocks: Blocks, call: Call, recipe: Recipe) -> tuple[Blocks, Denoised]:
    """A block (B, S) whose first token is given."""
    size = recipe.block_size
    given = call.given.at(slice(0, size))
    # AR may have said the mask token, which the denoiser then takes for an undecided position.
    given = given._replace(
        tokens=given.tokens.at[:, 0].set(slots.token),
        fixed=given.fixed.at[:, 0].set(slots.token != model.config.mask_token_id),
    )
    blocks, done = denoise(
        model,
        recipe,
        call,
        slots.cache,
        blocks,
        given,
        slots.active & call.alive,
        keys=row_keys(call.draws.seed, call.draws.sample),
        block=slots.count,
        token_keys=_keys(slots, call, size)[:, :size],
    )
    # It must not replace it.
    return blocks, done._replace(block=done.block.at[:, 0].set(slots.token))


def commit(model: TwoTower, slots: Slots, call: Call, recipe: Recipe, draft: Denoised) -> tuple[Slots, Emitted]:
    """Verification of a draft: 1 … S tokens per row."""
    done, size, block = draft.done, recipe.block_size, draft.block
    logits, memories = model.verify(block, slots.cache)
    given = call.given.at(slice(1, None))
    logits = constrained(logits, given.allowed)
    place = jnp.arange(size)
    # As `ar` chooses, with the same arguments.
    choices, finite, *_ = choose(call.draws, slots.count[:, None] + place, logits, given._replace(allowed=None))
    kept = _keep(block[:, 1:], choices[:, :-1], logits[:, :-1], call.tolerance)
    accepted = jnp.sum(jnp.cumprod(kept, axis=1, dtype=jnp.int32), axis=1)

    tokens = jnp.where(place < accepted[:, None], jnp.roll(block, -1, axis=1), choices)
    added = jnp.where(done, accepted + 1, 0)
    given_out = place < added[:, None]
    count = slots.count + added
    continuing = done & ~jnp.any(ends(tokens, call.eos) & given_out, axis=1) & (count < slots.limit)
    newest = jnp.take_along_axis(tokens, accepted[:, None], axis=1)[:, 0]
    emitted = Emitted(
        # Logits after the first token that is not kept belong to no text that is given out.
        said=said(logits, tokens, finite, recipe.alternatives),
        count=added,
        denoiser_evaluations=draft.evaluations,
        context_evaluations=done.astype(jnp.int32),
        finite=draft.finite & (~done | jnp.all(finite | ~given_out, axis=1)),
        accepted=jnp.where(done, accepted, 0),
        revealed=draft.revealed,
        trace=draft.trace,
    )
    # Keys are written after they were last read, so that they are not copied.
    memories, added = jax.lax.optimization_barrier((memories, added))
    slots = slots.replace(
        cache=model.keep(slots.cache, memories, added),
        token=jnp.where(done, newest, slots.token),
        count=count,
        active=jnp.where(done, continuing, slots.active),
    )
    return slots, emitted


def _keys(slots: Slots, call: Call, size: int) -> Key[Array, "B {size}+1"]:
    """Keys (B, S + 1) of the tokens of a block and the one after it: position j holds new token count − 1 + j."""
    return next_keys(call.draws.seed, call.draws.sample, slots.count[:, None] + jnp.arange(-1, size))


def _keep(
    draft: Int[Array, "B n"], choices: Int[Array, "B n"], logits: Float[Array, "B n V"], tolerance: Float[Array, " B"]
) -> Bool[Array, "B n"]:
    """Whether to keep each draft token (B, S − 1), given AR's choices at the same places and its logits for them."""
    drafted = jnp.take_along_axis(logits, draft[..., None], axis=-1)[..., 0]
    # At tolerance 0 no token is more probable than the best, and at 1 every one is more probable than never.
    return (draft == choices) | (drafted - jnp.max(logits, axis=-1) > jnp.log1p(-tolerance)[:, None])
