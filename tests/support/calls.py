"""What the engine does, in one go: all that it is asked, or one call of the compiled block, to look at the program."""

from collections.abc import Sequence

import numpy as np

from twotower_jax.generation import Engine, Request, Result, scheduling
from twotower_jax.generation.modes import Blocks
from twotower_jax.generation.rows import Row
from twotower_jax.generation.stops import Ending


def results_of(engine: Engine, requests: Sequence[Request]) -> list[Result]:
    """The result of each, all submitted together."""
    found, numbers = {}, [engine.submit(request) for request in requests]
    while engine.busy:
        for progress in engine.step():
            assert progress.number in numbers and progress.error is None
            if progress.result is not None:
                found[progress.number] = progress.result
    return [found[number] for number in numbers]


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
