"""What runs have left in their workdirs, here or in a store, to be compared."""

import json

import jax
import numpy as np

from twotower_jax.checkpoint import orbax_steps, workdir
from twotower_jax.paths import as_path


def rows(path) -> list[dict]:
    """What metrics.jsonl says, without what depends on the clock."""
    lines = (as_path(str(path)) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def state(path, step: int = 5) -> dict[str, bytes]:
    """Every array of a step, by name."""
    found = {}
    for tree in (workdir.PARAMS, workdir.OPTIMIZER):
        folder = as_path(str(path)) / workdir.CHECKPOINTS / str(step) / tree
        target = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
            orbax_steps.stored_arrays(folder),
        )
        for place, array in jax.tree_util.tree_leaves_with_path(orbax_steps.restore_arrays(folder, target)):
            found[tree + jax.tree_util.keystr(place)] = np.asarray(array).tobytes()
    return found


def same(a, b) -> bool:
    """Whether two trees of arrays have the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for x, y in pairs)
