"""Several processes that read batches at the same time, each its own rows, as the hosts of a run do."""

import multiprocessing
import multiprocessing.synchronize
import pathlib
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection

from twotower_jax.data import TrainingData, load_tokenizer
from twotower_jax.data.opening import Data, Packing


def rates(
    path: pathlib.Path, tokenizer: pathlib.Path, packing: Packing, batch_size: int, processes: int, seconds: float
) -> tuple[float, float]:
    """Tokens a second by the clock, of all processes together, and a second of processor time.

    Args:
      path: what config.data would name. tokenizer: the folder of its tokenizer.
      batch_size: rows of all processes together; a multiple of `processes`.
      seconds: how long to read.
    """
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(processes)
    pipes, started = [], []
    for index in range(processes):
        mine, theirs = context.Pipe()
        given = (path, tokenizer, packing, batch_size, index, processes, seconds, begin, theirs)
        started.append(context.Process(target=_read, args=given))
        started[-1].start()
        theirs.close()
        pipes.append(mine)
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(Connection.recv, pipes))
    for process in started:
        process.join()
    tokens, clock, processor = (sum(values) for values in zip(*found, strict=True))
    return tokens / (clock / processes), tokens / processor


def _read(
    path: pathlib.Path,
    tokenizer: pathlib.Path,
    packing: Packing,
    batch_size: int,
    index: int,
    count: int,
    seconds: float,
    begin: multiprocessing.synchronize.Barrier,
    result: Connection,
) -> None:
    windows = Data(str(path)).windows(load_tokenizer(tokenizer), packing)[0]
    data = TrainingData(windows, batch_size=batch_size, seed=0, process_index=index, process_count=count)
    next(data)
    begin.wait()
    started, used, tokens = time.monotonic(), time.process_time(), 0
    while time.monotonic() - started < seconds:
        tokens += next(data)["ids"].size
    result.send((tokens, time.monotonic() - started, time.process_time() - used))
