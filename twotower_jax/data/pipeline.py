"""Batches of token ids for training, endless and resumable, and for validation, each window once.

A batch is a function of the data, the seed and the step alone. With several processes, process p of P reads rows
[p B / P, (p + 1) B / P) of every global batch of B rows, so the global batch is the same for any P.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from twotower_jax.data.mixture import Mixture
from twotower_jax.data.packing import PackedSequences
from twotower_jax.data.tokenizer import PAD_ID
from twotower_jax.data.windows import Concatenation, DocumentWindows

if TYPE_CHECKING:  # Only what trains needs it, and it takes long to import.
    import grain


class TrainingData:
    """An endless iterator over batches {"ids": int32 (B / P, L)}.

    Where the windows tell documents apart, batches also hold "document_start", int32, and "counted", bool, of the same
    shape; see `DocumentWindows`. Every epoch of a source visits each of its windows once, in an order of its own; a
    batch may span two epochs. `get_state` and `set_state` move to any step in constant time. The state does not depend
    on the process, or on how many there are.
    """

    def __init__(
        self,
        sequences: PackedSequences | DocumentWindows | Mixture,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """`batch_size` is the global number of rows, B; `seed` is a non-negative integer.

        Raises:
          ValueError: `process_count` does not divide `batch_size`, or `process_index` is out of range; or the shares of
            a mixture change by steps of another number of rows.
        """
        import grain

        if isinstance(sequences, Mixture) and sequences.batch_size not in (None, batch_size):
            raise ValueError(f"the mixture's weights change by steps of {sequences.batch_size} rows, not {batch_size}")
        rows = _local_batch_size(batch_size, process_index, process_count)
        self._batches = grain.MapDataset.source(_Batches(sequences, seed, batch_size, process_index * rows, rows))
        self._identity = {"seed": seed, "batch_size": batch_size} | sequences.identity()
        self._seek(0)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict:
        """Returns, as JSON-able values, the step of the next batch and what the batches are drawn from."""
        return {"step": self._step, "data": dict(self._identity)}

    def set_state(self, state: dict) -> None:
        """Continues at the step of a state that `get_state` returned.

        Raises:
          ValueError: the state is malformed, or belongs to other data or another way of drawing batches from them;
            the message lists every field that differs. Grain alone would go on with different batches.
        """
        match state:
            case {"step": int(step), "data": dict(saved)} if step >= 0:
                pass
            case _:
                raise ValueError(f"not a state of the training data: {state!r}")
        differences = [
            f"{name} {saved.get(name, 'absent')} -> {self._identity.get(name, 'absent')}"
            for name in sorted(saved.keys() | self._identity.keys())
            if saved.get(name) != self._identity.get(name)
        ]
        if differences:
            raise ValueError(f"cannot resume on different training data (saved -> now): {', '.join(differences)}")
        self._seek(step)

    def _seek(self, step: int) -> None:
        # A slice renumbers batches without reading any. Grain's own iterator state would do as well, but its layout
        # is Grain's, and a saved run should outlive it.
        import grain

        # One thread, a little ahead of the device, hides the assembly of batches: `launch/benchmark.py data`.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        self._iterator = iter(self._batches[step:].to_iter_dataset(options))
        self._step = step


def epochs(source: Sequence, seed: int, number: int) -> "grain.MapDataset":
    """The entries of the `number`-th source in the order of training, without end: each epoch all of them.

    Each source has an order of its own; that of the first is the order it would have alone.
    """
    import grain

    return grain.MapDataset.source(source).seed(seed + (number << 64)).shuffle().repeat()


class _Batches:
    """One process's share of every global batch, as an endless random-access data source for Grain."""

    def __init__(self, sequences, seed: int, batch_size: int, first_row: int, rows: int):
        self._mixture = sequences if isinstance(sequences, Mixture) else None
        sources = [sequences] if self._mixture is None else list(self._mixture.sources.values())
        self._sources = [epochs(source, seed, number) for number, source in enumerate(sources)]
        self._batch_size, self._first_row, self._rows = batch_size, first_row, rows

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        first = step * self._batch_size + self._first_row
        windows = [self._row(row) for row in range(first, first + self._rows)]
        return {name: np.stack([window[name] for window in windows]) for name in windows[0]}

    def _row(self, row: int) -> dict[str, np.ndarray]:
        source, row = (0, row) if self._mixture is None else self._mixture.locate(row)
        return self._sources[source][row]


def validation_batches(
    sequences: PackedSequences | DocumentWindows | Concatenation,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every window once, in order, as batches {"ids": int32 (B / P, L), "weight": float32 (B / P,)}.

    Where the windows tell documents apart, also with "document_start" and "counted", as in training. The weight is 1
    for a window and 0 for the rows of padding that complete the last global batch, so that all batches have one shape
    and all processes see as many.

    Raises:
      ValueError: at the first batch, `process_count` does not divide `batch_size` or `process_index` is out of range.
    """
    rows = _local_batch_size(batch_size, process_index, process_count)
    for start in range(0, len(sequences), batch_size):
        first = start + process_index * rows
        windows = [sequences[i] for i in range(first, min(first + rows, len(sequences)))]
        filler = {name: np.zeros_like(value) for name, value in (windows[0] if windows else sequences[0]).items()}
        filler["ids"] += PAD_ID
        padded = windows + [filler] * (rows - len(windows))
        batch = {name: np.stack([window[name] for window in padded]) for name in filler}
        yield batch | {"weight": (np.arange(rows) < len(windows)).astype(np.float32)}


def _local_batch_size(batch_size: int, process_index: int, process_count: int) -> int:
    """Returns a process's rows of a global batch, B / P; ValueError if the three numbers do not fit together."""
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is outside [0, process_count {process_count})")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of process_count {process_count}")
    return batch_size // process_count
