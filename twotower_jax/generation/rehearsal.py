"""What generation needs of memory beside weights and caches, asked of the compiler before anything is allocated.

An engine is given shapes in place of arrays, and a table that compiles what it is asked for in place of calling it, as
far as the first block. What is compiled is what will run, so that the compilation cache has it when it does.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from twotower_jax import quantization
from twotower_jax.generation import slots
from twotower_jax.generation.blocks import block, empty_blocks
from twotower_jax.generation.engine import start
from twotower_jax.generation.modes import Call, Recipe
from twotower_jax.generation.placement import TowerMeshes, in_force, row_format
from twotower_jax.generation.settings import Settings, has_blocks
from twotower_jax.generation.stops import Decode
from twotower_jax.memory import temporaries
from twotower_jax.parameters import Params, ShardingOf, parameter_table, unflatten
from twotower_jax.quantization import Method
from twotower_jax.two_tower import TwoTower


def abstract_params(
    model: TwoTower, method: Method | None, dtype: np.dtype, sharding_of: ShardingOf, platform: str
) -> Params:
    """Shapes of parameters as they are loaded for generation.

    Args:
      method: by which they are quantized, if they are; dtype: of the others, but those that have to be float32.
      sharding_of: where each lies; None for the default device. platform: of the devices.
    """

    def stored(parameter):
        read = quantization.as_read(parameter, quantization.abstract(parameter, method, dtype), platform)

        def one(leaf):
            place = sharding_of(dataclasses.replace(parameter, shape=leaf.shape))
            place = place and row_format(parameter, leaf.shape, place, platform)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        return jax.tree.map(one, read)

    return unflatten({path: stored(parameter) for path, parameter in parameter_table(model).items()})


def needed(
    model: TwoTower,
    params: Params,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    placement: TowerMeshes,
    decode: Decode | None = None,
) -> dict[str, int]:
    """Bytes of each device that generating takes beside weights: of caches, and of the neediest program for a while.

    Args:
      params: shapes, as `abstract_params` gives them. placement: of towers that are together. decode: for stop texts.

    Raises:
      ValueError: as of `engine.start`.
    """
    engine = start(model, params, prompts, settings, placement=placement, decode=decode, table=_Rehearsal)
    try:
        while engine.busy:
            engine.step()
    except _Done as done:
        return {"caches": engine.cache_bytes, "temporaries as compiled": done.temporaries}
    raise AssertionError("an engine was done before its first block")


class _Done(Exception):  # noqa: N818 (no error)
    """All programs are compiled."""

    def __init__(self, temporaries: int):
        super().__init__()
        self.temporaries = temporaries


class _Rehearsal:
    """As `blocks.Table`, but nothing is there: programs are compiled, up to that of the first block."""

    apart = False

    def __init__(self, model: TwoTower, params: Params, placement: TowerMeshes, *, batch: int, capacity: int, **rest):
        del rest
        self._model, self._params, self._mesh, self._batch = model, params, placement.context, batch
        self._slots = slots.abstract(model, batch, capacity, self._mesh)
        self._most = 0

    def read(self, piece: slots.Piece, *, adapter: str | None = None, **options) -> None:
        self._compile(slots.prefill, piece, **options)

    def block(self, call: Call, recipe: Recipe, kind=None, adapter: str | None = None) -> None:
        blocks = None
        if has_blocks(recipe.mode):
            with in_force(self._mesh):
                blocks = jax.eval_shape(lambda: empty_blocks(batch=self._batch, block_size=recipe.block_size))
        self._compile(block, blocks, call, recipe=recipe)
        raise _Done(self._most)

    def _compile(self, function, *arguments, **options) -> None:
        with in_force(self._mesh):
            lowered = function.lower(self._params, self._slots, *arguments, model=self._model, **options)
            self._most = max(self._most, temporaries(lowered.compile()) or 0)
