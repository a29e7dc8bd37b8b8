"""How well windows are shuffled over shards: the order of an epoch, compared with permutations drawn uniformly.

Of each order are measured the correlation of neighbors' places in the data, how often neighbors lie in one shard and
how often within 100 windows, how many shards a batch holds, how the parts of an epoch spread over the parts of the data
(chi-squared over its degrees of freedom), and the correlation of a window's places in two epochs. Reads no data: the
order is a function of the number of windows and the seed.
"""

import time
from collections.abc import Callable

import numpy as np
from absl import flags

from twotower_jax.data.pipeline import epochs

_PARTS = 32
_NEAR = 100


def define_flags() -> None:
    flags.DEFINE_integer("windows", 100_000, "In the set.", lower_bound=_PARTS**2)
    flags.DEFINE_integer("shards", 100, "Of equal size.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 64, "Windows in a batch.", lower_bound=2)
    flags.DEFINE_integer("seeds", 8, "Orders of each kind.", lower_bound=2)


def main() -> None:
    windows, seeds = flags.FLAGS.windows, range(flags.FLAGS.seeds)
    started = time.process_time()
    kinds: dict[str, Callable[[int], np.ndarray]] = {"of training": _of_training, "uniform": _uniform}
    found = {name: [quality(order(seed), _shard_of(windows)) for seed in seeds] for name, order in kinds.items()}
    print(
        f"{windows:,} windows in {flags.FLAGS.shards} shards, batches of {flags.FLAGS.batch_size}, {len(seeds)} seeds; "
        f"{time.process_time() - started:.0f} s of processor time\n"
    )
    print("| mean and standard deviation over the seeds | of training | uniform permutations |")
    print("|---|--:|--:|")
    for name in found["uniform"][0]:
        cells = []
        for rows in found.values():
            values = np.array([row[name] for row in rows])
            cells.append(f"{values.mean():.5f} ± {values.std(ddof=1):.5f}")
        print(f"| {name} | {' | '.join(cells)} |")


def quality(orders: np.ndarray, shards: np.ndarray) -> dict[str, float]:
    """What the order of two epochs is like.

    Args:
      orders: int64 (2, windows), the windows' places in the data, in the order in which they are read.
      shards: int64 (windows,), the shard of each.
    """
    order, after = orders
    count, batch = len(order), flags.FLAGS.batch_size
    own = shards[order]
    whole = count // batch * batch
    in_batches = np.sort(own[:whole].reshape(-1, batch), axis=1)
    table = np.zeros((_PARTS, _PARTS))
    np.add.at(table, (np.arange(count) * _PARTS // count, order * _PARTS // count), 1)
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / count
    places = np.argsort(orders, axis=1)
    return {
        "correlation of neighbors' places": float(np.corrcoef(order[:-1], order[1:])[0, 1]),
        "neighbors in one shard": float((own[:-1] == own[1:]).mean()),
        f"neighbors within {_NEAR} windows": float((np.abs(np.diff(order)) <= _NEAR).mean()),
        "shards in a batch": float(1 + (np.diff(in_batches, axis=1) != 0).sum(axis=1).mean()),
        "chi-squared of parts, a degree of freedom": float(
            ((table - expected) ** 2 / expected).sum() / (_PARTS - 1) ** 2
        ),
        "correlation of two epochs": float(np.corrcoef(*places)[0, 1]),
    }


def _shard_of(windows: int) -> np.ndarray:
    return np.arange(windows) * flags.FLAGS.shards // windows


def _of_training(seed: int) -> np.ndarray:
    windows = flags.FLAGS.windows
    order = epochs(range(windows), seed, 0)
    return np.array([order[i] for i in range(2 * windows)]).reshape(2, windows)


def _uniform(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(flags.FLAGS.windows) for _ in range(2)])
