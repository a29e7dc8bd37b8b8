"""The loss of held-out text, and how far it can be trusted.

Every window counts once for a backbone. The loss of a denoiser depends on the noise that is drawn as well: each window
is seen at noise levels spread evenly over the windows, and where there are few of them several times, so that what is
drawn is next to nothing beside what the text varies. Nothing depends on the size of a batch, or on the mesh.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from twotower_jax.compiling import compiler_options
from twotower_jax.data import validation_batches
from twotower_jax.diffusion import LossSum
from twotower_jax.parameters import Params
from twotower_jax.train.metrics import LossWindow, Row, finite
from twotower_jax.train.objectives import BY_ROW, Losses, Objective
from twotower_jax.train.placement import Placement
from twotower_jax.train.step import make_validation
from twotower_jax.train.terms import evenness

# Rows that a denoiser sees at least, by drawing noise for each window several times.
MIN_ROWS = 64

# With fewer windows the standard error itself is off by more than a third, and is not printed.
MIN_WINDOWS = 8


class Validation:
    """Passes over the held-out windows.

    Attributes:
      rows: that a pass has, each window `draws` times.
    """

    def __init__(self, windows: Any, objective: Objective, placement: Placement, batch_size: int):
        """`windows`: what `validation_batches` takes."""
        self._windows, self._objective, self._placement, self._batch_size = windows, objective, placement, batch_size
        self._count = len(windows)
        self.draws = -(-MIN_ROWS // self._count) if objective.is_noisy and self._count < MIN_ROWS else 1
        self.rows = self._count * self.draws
        # Neighbors in noise level are windows far apart in the text.
        self._place = np.arange(self._count) * _stride(self._count) % self._count

    @property
    def warning(self) -> str | None:
        """What to say at the start where too little is held out."""
        if self._count >= MIN_WINDOWS:
            return None
        windows = "1 window is" if self._count == 1 else f"{self._count} windows are"
        return (
            f"warning: {windows} held out for validation ({self._windows.tokens:,} tokens); a standard error worth "
            f"printing takes {MIN_WINDOWS}: raise validation_fraction or give more text"
        )

    def compiled(self, block_size: int) -> Callable[..., Losses]:
        """What `run` calls."""
        validate = make_validation(self._objective, block_size, self.rows)
        return jax.jit(validate, out_shardings=self._placement.everywhere, compiler_options=compiler_options())

    def run(self, validate: Callable[..., Losses], trained: Params, frozen: Params) -> Row:
        """Means over all windows as in a row of training, and `loss_stderr`, the standard error of `loss`.

        It is None with a single window, which tells nothing of others.
        """
        placement, size, weights = self._placement, self._batch_size, self._objective.for_validation().weights
        window = LossWindow(weights)
        load = LossSum(0.0, 0.0)
        sums = {term: np.zeros((2, self._count)) for term in weights}
        repeated = _Repeated(self._windows, self.draws)
        for i, read in enumerate(validation_batches(repeated, size, **placement.reading)):
            batch = placement.batch(read)
            counted, index = map(placement.rows, (read["weight"] > 0, self._index(placement.numbers + i * size)))
            with placement.in_force():
                losses = validate(trained, frozen, batch.ids, counted, index, batch.documents)
            losses = jax.device_get(losses)
            if "expert_load" in losses:
                load = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), load, losses.pop("expert_load"))
            rows = placement.order + i * size
            for term in weights:
                # Filler has sums of 0 and counts for nothing, wherever it is added.
                np.add.at(sums[term], (slice(None), rows % self._count), np.stack(losses.pop(term + BY_ROW)))
            window.add(losses)
        row = window.means()
        if np.ndim(load.total):
            # Not the mean of the batches' busiest, which would be the larger the smaller the batches are.
            whole = load.total / load.count
            row["expert_load"] = [finite(v) for v in np.max(whole, axis=1)]
            row["expert_entropy"] = [finite(v) for v in np.asarray(evenness(np.float32(whole)))]
        weighted = {term: np.stack([weights[term] * total, count]) for term, (total, count) in sums.items()}
        return row | {"loss_stderr": finite(self._standard_error(weighted))}

    def _index(self, rows: np.ndarray) -> np.ndarray:
        """The number that the noise of each row depends on, int32: window by window in a draw, draw after draw."""
        rows = rows % self.rows
        return (rows // self._count * self._count + self._place[rows % self._count]).astype(np.int32)

    def _standard_error(self, sums: Mapping[str, np.ndarray]) -> float:
        """The standard error of the sum of the terms' means, each a ratio of totals over windows.

        From the differences of neighbors in noise level (successive differences, as for systematic samples: Wolter
        2007, Introduction to Variance Estimation, section 8.2): that the loss depends on the level is no uncertainty of
        its mean over even levels.
        """
        if self._count < 2:
            return math.nan
        residual = np.zeros(self._count)
        for total, count in sums.values():
            whole = count.sum()
            if whole == 0:
                return math.nan
            residual += (total - total.sum() / whole * count) / whole
        ordered = residual[np.argsort(self._place)]
        return math.sqrt(self._count / (2 * (self._count - 1)) * np.sum(np.diff(ordered) ** 2))


class _Repeated:
    """Windows, all of them several times over."""

    def __init__(self, windows: Any, times: int):
        self._windows, self._times = windows, times

    def __len__(self) -> int:
        return len(self._windows) * self._times

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._windows[index % len(self._windows)]


def _stride(count: int) -> int:
    """Without a common divisor with `count`, and near its golden section."""
    near = round(count * (math.sqrt(5) - 1) / 2)
    return next(n for n in range(max(1, near), 2 * count + 2) if math.gcd(n, count) == 1)
