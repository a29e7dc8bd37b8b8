"""How fast a checkpoint goes to a store and comes back, beside plain copying of the same bytes by gcsfs.

Without --address the store is a server of gs:// that this command starts, in memory and on this machine. Ways are timed
in turns, and each one's best time counts.
"""

import contextlib
import pathlib
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import flags

import buckets
from twotower_jax.checkpoint import orbax_steps, store_steps
from twotower_jax.paths import as_path
from twotower_jax.stores.path import StorePath

SAVE, RESTORE, PUT, GET = "save a step", "restore it", "copy the same objects there (gcsfs put)", "copy them back (get)"


def define_flags() -> None:
    flags.DEFINE_integer("megabytes", 256, "Of the state, in float32 arrays of 16 MB.", lower_bound=16)
    flags.DEFINE_integer("rounds", 3, "Of which the best counts.", lower_bound=1)
    flags.DEFINE_string("address", "", "Of a folder of a bucket to use instead, which need not exist.")


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    with contextlib.ExitStack() as stack:
        address = flags.FLAGS.address
        if not address:
            stack.enter_context(buckets.gs())
            address = f"gs://{buckets.BUCKET}/measured"
        times = measure(as_path(address), flags.FLAGS.megabytes, flags.FLAGS.rounds)
    print(table(times, flags.FLAGS.megabytes))


def table(times: dict[str, float], megabytes: int) -> str:
    """The times as a Markdown table."""
    lines = ["| | MB/s |", "|---|--:|"]
    lines += [f"| {what} | {megabytes / seconds:.0f} |" for what, seconds in times.items()]
    return "\n".join(lines)


def measure(folder: StorePath, megabytes: int, rounds: int) -> dict[str, float]:
    """Seconds of each way, the best of so many rounds."""
    import gcsfs

    rng = np.random.default_rng(0)
    arrays = {f"array_{i}": jax.numpy.asarray(rng.random((4000, 1000), np.float32)) for i in range(megabytes // 16)}
    target = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), arrays)
    times: dict[str, float] = {}

    def timed(what: str, action: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = action()
        times[what] = min(times.get(what, np.inf), time.perf_counter() - start)
        return result

    system = gcsfs.GCSFileSystem(use_listings_cache=False, skip_instance_cache=True)
    for number in range(rounds):
        step = folder / str(number)

        def save(step: StorePath = step) -> None:
            writer = store_steps.StoreWriter()
            writer.start(step, {"params": arrays}, {})
            writer.wait()

        timed(SAVE, save)
        found = timed(RESTORE, lambda step=step: orbax_steps.restore_arrays(step / "params", target))
        assert all((found[name] == array).all() for name, array in arrays.items())
        with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
            here, plain = pathlib.Path(scratch), str(folder / f"plain_{number}")
            timed(GET, lambda step=step, here=here: system.get(str(step / "params"), str(here), recursive=True))
            timed(PUT, lambda here=here, plain=plain: system.put(str(here), plain, recursive=True))
        for name in (str(number), f"plain_{number}"):
            (folder / name).remove_tree()
    return {what: times[what] for what in (SAVE, PUT, RESTORE, GET)}
