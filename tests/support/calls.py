"""A call of the compiled block, as the engine makes it, for tests that look at the program."""

import numpy as np

from twotower_jax.generation import Request, scheduling
from twotower_jax.generation.modes import Blocks
from twotower_jax.generation.rows import Row
from twotower_jax.generation.stops import Ending


def call_of(model, request: Request, rows: int):
    """The blocks, the call and the recipe of `rows` times the same request."""
    ending, eos = Ending(request.max_new_tokens), model.config.eos_token_ids
    ids = np.array(request.prompt, np.int32)
    table = [Row(i, request, ids, eos, ending, False, model.config.mask_token_id) for i in range(rows)]
    kind = table[0].kind
    width = scheduling.end_token_width(table[0])
    blocks = Blocks(np.zeros((rows, kind.block_size), np.int32), np.zeros(rows, np.int32))
    recipe = scheduling.recipe(kind, table, False, False, model.config.vocab_size)
    standing = scheduling.standing(kind, table, width, model.config)
    call = scheduling.now(standing, kind, table, rows, model.config)
    return blocks if table[0].blockwise else None, call, recipe
