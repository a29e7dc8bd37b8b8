"""Blocks as they run: the table of rows on its devices, and the compiled functions that read prompts and make blocks.

Where the towers are together, a block is one compiled function. Where each has devices of its own it is two, the draft
and the commit (modes.py), and the denoiser has a copy of the table: after each commit it is sent what the commit
changed, the states and the newest keys. Between the halves of one call the other half of another's rows may go on.
"""

import functools
from collections.abc import Hashable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from twotower_jax import sharding
from twotower_jax.cache import Cache
from twotower_jax.generation import modes, speculative
from twotower_jax.generation.modes import Blocks, Call, Denoised, Emitted, Recipe
from twotower_jax.generation.placement import TowerMeshes, bind_part, in_force, moved
from twotower_jax.generation.settings import has_blocks
from twotower_jax.generation.slots import (
    Piece,
    Said,
    Slots,
    absorb,
    allocate,
    laid_out,
    newest,
    piece_of,
    prefill,
    put_piece,
    put_slots,
    take_slots,
)
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower

# By name: of each a draft and a commit.
_MODES = {
    "diffusion": (modes.diffusion_draft, modes.diffusion_commit),
    "speculative": (speculative.draft, speculative.commit),
    "ar": (modes.no_draft, modes.token_commit),
    "mock_ar": (modes.mock_draft, modes.token_commit),
}
# What the denoiser has made of a call, and the context is to read.
Draft = tuple[Blocks | None, Denoised | Said]
# How many tokens one call generates in the modes that generate one at a time.
TOKENS_PER_CALL = 16


@functools.partial(jax.jit, static_argnames=("model", "recipe"), donate_argnames=("slots", "blocks"))
def block(
    params: Params, slots: Slots, blocks: Blocks | None, call: Call, *, model: TwoTower, recipe: Recipe
) -> tuple[Slots, Blocks | None, Emitted]:
    """Blocks of rows as far as `call` says, with no round trip to the host inside. It consumes `slots` and `blocks`."""
    bound = bind_part(model, params)
    draft, commit = _MODES[recipe.mode]

    def one_token(slots, call):
        return commit(bound, slots, call, recipe, draft(bound, slots, call, recipe))

    if has_blocks(recipe.mode):
        blocks, drafted = draft(bound, slots, blocks, call, recipe)
        slots, emitted = commit(bound, slots, call, recipe, drafted)
        blocks = _rows_divided(blocks)
    else:
        slots, emitted = modes.in_a_row(one_token, slots, call, TOKENS_PER_CALL)
    return laid_out(model, slots), blocks, emitted


@functools.partial(jax.jit, static_argnames=("model", "recipe"))
def _draft(params: Params, slots: Slots, blocks: Blocks | None, call: Call, *, model: TwoTower, recipe: Recipe):
    """The denoiser's half of a block."""
    bound, draft = bind_part(model, params), _MODES[recipe.mode][0]
    if not has_blocks(recipe.mode):
        return None, draft(bound, slots, call, recipe)
    blocks, drafted = draft(bound, slots, blocks, call, recipe)
    return _rows_divided(blocks), drafted


@functools.partial(jax.jit, static_argnames=("model", "recipe"), donate_argnames="slots")
def _commit(
    params: Params, slots: Slots, call: Call, draft, *, model: TwoTower, recipe: Recipe
) -> tuple[Slots, Slots, Emitted]:
    """The context's half, and what it changed. It consumes `slots`."""
    before, width = slots.cache.lengths, recipe.block_size  # Positions that a commit writes.
    if isinstance(draft, Denoised):  # Rows may have been canceled since.
        draft = draft._replace(done=draft.done & call.alive)
    slots, emitted = _MODES[recipe.mode][1](bind_part(model, params), slots, call, recipe, draft)
    slots = laid_out(model, slots)
    return slots, newest(model, slots, before, width), emitted


def _rows_divided(blocks: Blocks) -> Blocks:
    return Blocks(sharding.constrain(blocks.xt, ("batch", None)), sharding.constrain(blocks.step, ("batch",)))


class Table:
    """The rows and the parameters on their devices.

    Args:
      batch: rows, a multiple of `placement.rows`. capacity: cache positions of each.
      denoiser: whether a mode is used that needs one.
      adapters: by name, parameters in place of `params`; arrays that they share are there once.
    """

    def __init__(
        self,
        model: TwoTower,
        params: Params,
        placement: TowerMeshes,
        *,
        batch: int,
        capacity: int,
        denoiser: bool = True,
        adapters: Mapping[str, Params] | None = None,
    ):
        self._model, self._placement, self._batch = model, placement, batch
        named = {None: params, **(adapters or {})}
        self._params = {name: placement.context_params(model, one) for name, one in named.items()}
        with in_force(placement.context):
            self._slots = allocate(model=model, batch=batch, capacity=capacity)
        # The blocks of each kind of rows, as far as they are.
        self._blocks: dict[Hashable, Blocks] = {}
        self._apart = placement.denoiser is not None and denoiser
        if self._apart:
            self._denoiser_params = {name: placement.denoiser_params(model, one) for name, one in named.items()}
            with in_force(placement.denoiser):
                self._view = allocate(model=model, batch=batch, capacity=capacity)

    def read(
        self, piece: Piece, *, first: bool, state: bool, alternatives: int = 0, adapter: str | None = None
    ) -> Said | None:
        """Reads pieces of prompts into their slots; see `slots.prefill`."""
        options = {"first": first, "state": state, "alternatives": alternatives}
        with in_force(self._placement.context):
            self._slots, chosen = prefill(self._params[adapter], self._slots, piece, model=self._model, **options)
        if self._apart and piece.last.any():
            # A prompt is sent once all of it is read.
            ready = piece.slot.copy()
            ready[~piece.last] = len(self._slots.active)
            with in_force(self._placement.context):
                rows = take_slots(self._slots, piece.slot, model=self._model)
            with in_force(self._placement.denoiser):
                rows = moved(rows, self._placement.denoiser)
                self._view = put_slots(self._view, ready, rows, model=self._model)
        return chosen

    def piece(self, slot: int, before: int, width: int) -> Cache:
        """What the newest `width` tokens, after the first `before`, added to the slot."""
        with in_force(self._placement.context):
            return piece_of(self._slots, np.array([slot]), np.array([before]), model=self._model, width=width)

    def put_pieces(self, slot: int, pieces: Sequence[Cache]) -> None:
        """Begins a prompt in the slot with what was kept of pieces."""
        with in_force(self._placement.context):
            for i, piece in enumerate(pieces):
                where = np.array([slot]), np.array([i == 0])
                self._slots = put_piece(self._slots, *where, piece, model=self._model)

    @property
    def apart(self) -> bool:
        """Whether the towers have devices of their own, which work at once."""
        return self._apart

    def block(self, call: Call, recipe: Recipe, kind: Hashable = None, adapter: str | None = None) -> Emitted:
        """What `call` says of the rows of one kind, whose blocks are kept under that name; one token of each, in mode
        mock_ar with the towers apart."""
        return self.finish(call, recipe, self.begin(call, recipe, kind, adapter), kind, adapter)

    def begin(self, call: Call, recipe: Recipe, kind: Hashable = None, adapter: str | None = None) -> Draft | None:
        """The denoiser's half of `block`, where the towers are apart and it has one; nothing is waited for."""
        if not self._apart or recipe.mode == "ar":
            return None
        with in_force(self._placement.denoiser):
            blocks, drafted = _draft(
                self._denoiser_params[adapter],
                self._view,
                self._blocks_of(kind, recipe, self._placement.denoiser),
                call,
                model=self._model,
                recipe=recipe,
            )
        if blocks is not None:
            self._blocks[kind] = blocks
        return blocks, drafted

    def finish(
        self, call: Call, recipe: Recipe, begun: Draft | None, kind: Hashable = None, adapter: str | None = None
    ) -> Emitted:
        """The other half, or all of it. Others may have begun since; `call` may have fewer rows alive than then."""
        options = {"model": self._model, "recipe": recipe}
        if begun is None:
            with in_force(self._placement.context):
                blocks = self._blocks_of(kind, recipe, self._placement.context)
                self._slots, blocks, emitted = block(self._params[adapter], self._slots, blocks, call, **options)
            return self._keep(kind, blocks, emitted)
        blocks, draft = begun
        told = {}
        if isinstance(draft, Denoised):  # What the context does not read.
            told = {"revealed": draft.revealed, "trace": draft.trace}
            draft = draft._replace(revealed=None, trace=None)
        with in_force(self._placement.context):
            draft = moved(draft, self._placement.context)
            self._slots, news, emitted = _commit(self._params[adapter], self._slots, call, draft, **options)
        with in_force(self._placement.denoiser):
            self._view = absorb(self._view, moved(news, self._placement.denoiser), model=self._model)
        return emitted._replace(blocks=blocks, **told)

    def _blocks_of(self, kind: Hashable, recipe: Recipe, mesh: Mesh | None) -> Blocks | None:
        """The blocks of a kind of rows as far as they are; None in modes without any."""
        if has_blocks(recipe.mode) and kind not in self._blocks:
            with in_force(mesh):
                self._blocks[kind] = empty_blocks(batch=self._batch, block_size=recipe.block_size)
        return self._blocks.get(kind)

    def _keep(self, kind: Hashable, blocks: Blocks | None, emitted: Emitted) -> Emitted:
        if blocks is None:
            return emitted
        self._blocks[kind] = blocks
        return emitted._replace(blocks=blocks)


@functools.partial(jax.jit, static_argnames=("batch", "block_size"))
def empty_blocks(*, batch: int, block_size: int) -> Blocks:
    """Blocks that have not begun."""
    return _rows_divided(Blocks(jnp.zeros((batch, block_size), jnp.int32), jnp.zeros(batch, jnp.int32)))
