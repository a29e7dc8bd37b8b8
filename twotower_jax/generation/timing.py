"""Several ways to do the same work, timed in turns: a machine that slows down then slows all of them."""

import time
from collections.abc import Callable, Sequence


def in_turns[T](
    ways: Sequence[Callable[[], T]], rounds: int, report: Callable[[str], None] = lambda line: None
) -> list[tuple[T, list[float]]]:
    """Runs each way once, which compiles and is not timed, and then all of them `rounds` times, one after another.

    Args:
      report: gets a line after each first run and after each round.

    Returns:
      of each way what its first run gave, and the seconds of each of the others by the clock.
    """
    firsts, seconds = [], [[] for _ in ways]
    for number, way in enumerate(ways, 1):
        firsts.append(way())
        report(f"compiled {number}/{len(ways)}")
    for number in range(1, rounds + 1):
        for way, times in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        report(f"round {number}/{rounds}")
    return list(zip(firsts, seconds, strict=True))
