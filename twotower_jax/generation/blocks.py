"""Blocks as they run: the table of rows on its devices, and the compiled functions that read prompts and make blocks.

Where the towers are together, a block is one compiled function. Where each has devices of its own it is two, the draft
and the commit (modes.py), and the denoiser has a copy of the table: after each commit it is sent what the commit
changed, the states and the newest keys.
"""

import functools

import jax

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import modes, speculative
from twotower_jax.generation.modes import Call, Denoised, Emitted, Recipe
from twotower_jax.generation.placement import TowerMeshes, bind_part, in_force, moved
from twotower_jax.generation.slots import (
    First,
    Piece,
    Slots,
    absorb,
    allocate,
    laid_out,
    newest,
    prefill,
    put_slots,
    take_slots,
)
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower

_MODES = {
    "diffusion": (modes.diffusion_draft, modes.diffusion_commit),
    "speculative": (speculative.draft, speculative.commit),
    "ar": (modes.no_draft, modes.token_commit),
    "mock_ar": (modes.mock_draft, modes.token_commit),
}
# How many tokens one call generates in the modes that generate one at a time.
TOKENS_PER_CALL = 16


@functools.partial(jax.jit, static_argnames=("model", "recipe"), donate_argnames="slots")
def block(params: Params, slots: Slots, call: Call, *, model: TwoTower, recipe: Recipe) -> tuple[Slots, Emitted]:
    """A block of each row, with no round trip to the host inside. It consumes `slots`."""
    bound = bind_part(model, params)
    draft, commit = _MODES[recipe.mode]

    def one(slots):
        return commit(bound, slots, call, recipe, draft(bound, slots, call, recipe))

    if recipe.mode in ("ar", "mock_ar"):
        slots, emitted = modes.in_a_row(one, slots.replace(active=slots.active & call.alive), TOKENS_PER_CALL)
    else:
        slots, emitted = one(slots)
    return laid_out(model, slots), emitted


@functools.partial(jax.jit, static_argnames=("model", "recipe"))
def _draft(params: Params, slots: Slots, call: Call, *, model: TwoTower, recipe: Recipe):
    """The denoiser's half of a block."""
    return _MODES[recipe.mode][0](bind_part(model, params), slots, call, recipe)


@functools.partial(jax.jit, static_argnames=("model", "recipe"), donate_argnames="slots")
def _commit(
    params: Params, slots: Slots, call: Call, draft, *, model: TwoTower, recipe: Recipe
) -> tuple[Slots, Slots, Emitted]:
    """The context's half, and what it changed. It consumes `slots`."""
    before, width = slots.cache.lengths, _width(recipe)
    slots, emitted = _MODES[recipe.mode][1](bind_part(model, params), slots, call, recipe, draft)
    slots = laid_out(model, slots)
    return slots, newest(model, slots, before, width), emitted


def _width(recipe: Recipe) -> int:
    """Positions that a commit writes."""
    return recipe.sampling.block_size if recipe.mode in ("diffusion", "speculative") else 1


class Table:
    """The rows and the parameters on their devices.

    Args:
      batch: rows, a multiple of `placement.rows`. capacity: cache positions of each.
      first: how the first new token is chosen, see `slots.prefill`.
    """

    def __init__(
        self,
        model: TwoTower,
        params: Params,
        placement: TowerMeshes,
        recipe: Recipe,
        *,
        batch: int,
        capacity: int,
        first: SamplingConfig | None,
    ):
        self._model, self._placement, self._recipe, self._first = model, placement, recipe, first
        self._params = placement.context_params(model, params)
        with in_force(placement.context):
            self._slots = allocate(model=model, batch=batch, capacity=capacity)
        # AR needs no denoiser.
        self._apart = placement.denoiser is not None and recipe.mode != "ar"
        if self._apart:
            self._denoiser_params = placement.denoiser_params(model, params)
            with in_force(placement.denoiser):
                self._view = allocate(model=model, batch=batch, capacity=capacity)

    def read(self, piece: Piece, seed, eos) -> First:
        """Reads pieces of prompts into their slots."""
        with in_force(self._placement.context):
            self._slots, first = prefill(
                self._params, self._slots, piece, seed, eos, model=self._model, first=self._first
            )
        if self._apart and piece.last.any():
            # A prompt is sent once all of it is read.
            ready = piece.slot.copy()
            ready[~piece.last] = len(self._slots.active)
            with in_force(self._placement.context):
                rows = take_slots(self._slots, piece.slot, model=self._model)
            with in_force(self._placement.denoiser):
                rows = moved(rows, self._placement.denoiser)
                self._view = put_slots(self._view, ready, rows, model=self._model)
        return first

    def block(self, call: Call) -> Emitted:
        """A block of each row; of one token, in mode mock_ar with the towers apart."""
        options = {"model": self._model, "recipe": self._recipe}
        if not self._apart:
            with in_force(self._placement.context):
                self._slots, emitted = block(self._params, self._slots, call, **options)
            return emitted
        with in_force(self._placement.denoiser):
            draft = _draft(self._denoiser_params, self._view, call, **options)
        trace = None
        if isinstance(draft, Denoised):  # The context does not read its trace.
            trace, draft = draft.trace, draft._replace(trace=None)
        with in_force(self._placement.context):
            draft = moved(draft, self._placement.context)
            self._slots, news, emitted = _commit(self._params, self._slots, call, draft, **options)
        with in_force(self._placement.denoiser):
            self._view = absorb(self._view, moved(news, self._placement.denoiser), model=self._model)
        return emitted._replace(trace=trace)
