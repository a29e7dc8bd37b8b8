"""Answers sampled by the engine, and every step of them as rows of the training pass.

The training pass takes all blocks of a sequence at once, each in a state of its own. So the first steps of all blocks
of an answer make one row, the second ones another, and an answer whose blocks took K steps at most makes K rows:

    clean   |....Q: 2 + 2 ?|4 </s> </s> </s>|
    noisy   |....Q: 2 + 2 ?|?  ?    ?    ?  |  t = 1      reveals </s> in the last two places
            |....Q: 2 + 2 ?|?  ?  </s> </s> |  t = 0.5    reveals 4 </s>

Blocks of generation begin where the prompt ends. A row has padding before the prompt, a document of its own, so that
the prompt ends on a block border of the training pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation import Settings
from twotower_jax.generation.engine import Engine, in_order, iter_steps, positions
from twotower_jax.generation.request import Request
from twotower_jax.generation.scheduling import round_up
from twotower_jax.generation.settings import Result
from twotower_jax.parameters import Params
from twotower_jax.two_tower import TwoTower


class Steps(NamedTuple):
    """Steps of answers, R rows of L tokens in blocks of S.

    Attributes:
      clean: (R, L) int32, what the context reads: padding, prompt, the finished blocks, padding.
      noisy: (R, L) int32, the blocks before a step; as `clean` where a block took no such step.
      t: (R, L/S) float32, the noise level that the denoiser was told.
      start: (R, L) int32, the first position of each position's document.
      revealed: (R, L) bool, the positions that the step decided and that the answer depends on; token: (R, L) int32, as
        what, 0 elsewhere.
      answer: (R,) int32, the number of the row's answer.
    """

    clean: np.ndarray
    noisy: np.ndarray
    t: np.ndarray
    start: np.ndarray
    revealed: np.ndarray
    token: np.ndarray
    answer: np.ndarray


class Sampler:
    """Samples answers with their steps; every call of a run has the same shapes.

    Args:
      longest: tokens of the longest prompt. new: tokens of an answer, at most. batch_size: answers computed together.
    """

    def __init__(self, model: TwoTower, sampling: SamplingConfig, *, longest: int, new: int, batch_size: int):
        self._model, self._sampling, self._new = model, sampling, new
        self._settings = Settings(max_new_tokens=new, sampling=sampling, batch_size=batch_size)
        self._capacity = positions(longest, new, self._settings)

    def __call__(
        self, params: Params, prompts: Sequence[Sequence[int]], seed: int, logprobs: int | None = None
    ) -> list[Result]:
        """A result for each prompt, with the trace. What becomes of one depends on it, its place and the seed.

        Args:
          prompts: token ids. logprobs: as of `Request`.

        Raises:
          ValueError: as `Engine`; FloatingPointError if logits are not finite.
        """
        engine = Engine(self._model, params, self._settings, capacity=self._capacity, record_trace=True)
        said = {"sampling": self._sampling, "seed": seed, "logprobs": logprobs}
        for prompt in prompts:
            engine.submit(Request(prompt=prompt, max_new_tokens=self._new, **said))
        return list(in_order(progress for steps in iter_steps(engine) for progress in steps))


class Layout(NamedTuple):
    """How rows are laid out.

    Attributes:
      before: tokens of padding and prompt, a multiple of S. length: L, a multiple of S. block_size: S.
      pad: the token of padding.
    """

    before: int
    length: int
    block_size: int
    pad: int

    @classmethod
    def of(cls, longest: int, new: int, block_size: int, pad: int) -> "Layout":
        """With room for prompts of `longest` tokens and answers of `new`."""
        before = round_up(longest, block_size)
        return cls(before, before + round_up(new, block_size), block_size, pad)


def steps_of(results: Sequence[Result], layout: Layout) -> Steps:
    """All steps of some answers with their traces, answer by answer.

    What a step decides after an answer's end counts only where tokens of the answer, decided later, have seen it: the
    rest is noise of mean 0.
    """
    rows = [row for number, result in enumerate(results) for row in _rows(number, result, layout)]
    return Steps(*(np.stack(field) for field in zip(*rows, strict=True)))


def _rows(number: int, result: Result, layout: Layout) -> list[Steps]:
    size, offset = layout.block_size, layout.before - len(result.prompt_ids)
    blocks = [[step for step in result.trace if step.block == block] for block in range(result.blocks)]
    clean = np.full(layout.length, layout.pad, np.int32)
    clean[offset : layout.before] = result.prompt_ids
    places = [slice(first, first + size) for first in range(layout.before, layout.length, size)]
    for place, steps in zip(places, blocks, strict=False):
        clean[place] = steps[-1].tokens
    at = np.arange(layout.length)
    start = np.where(at < offset, 0, offset).astype(np.int32)
    said = at < layout.before + len(result.tokens)
    # The last step of the last block that decides a token of the answer.
    within = len(result.tokens) - (result.blocks - 1) * size
    latest = max(k for k, step in enumerate(blocks[-1]) if any(i < within for i in step.committed))
    rows = []
    for k in range(max(map(len, blocks))):
        noisy, t = clean.copy(), np.zeros(layout.length // size, np.float32)
        revealed, token = np.zeros(layout.length, bool), np.zeros(layout.length, np.int32)
        for place, steps in zip(places, blocks, strict=False):
            if k < len(steps):
                noisy[place], t[place.start // size] = steps[k].xt, steps[k].t
                decided = place.start + np.array(steps[k].committed, np.int64)
                revealed[decided] = said[decided] | (k < latest)
                token[place] = np.where(revealed[place], steps[k].tokens, 0)
        rows.append(Steps(clean, noisy, t, start, revealed, token, np.int32(number)))
    return rows
