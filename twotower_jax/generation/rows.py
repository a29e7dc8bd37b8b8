"""A row as the host knows it, from its request to its result, and what it tells of each call."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from twotower_jax.diffusion import Strategy
from twotower_jax.generation.guide import Guide
from twotower_jax.generation.modes import Emitted, Trace
from twotower_jax.generation.request import Request
from twotower_jax.generation.settings import Result, Step, TokenLogprob, has_blocks
from twotower_jax.generation.slots import Said
from twotower_jax.generation.stops import Ending


class Progress(NamedTuple):
    """What a row got from one call.

    Attributes:
      number: the row's.
      block: number of the block (of the call, where one token is generated at a time), or None: the first token of ar
        and speculative, which reading the prompt gives.
      start: how many new tokens the row had before.
      tokens: new in this block, before the row is cut; none as long as the block is not finished.
      steps: the denoiser's, if a trace is recorded.
      accepted: how many of the first tokens are a draft's, in speculative mode.
      result: if the row is done.
      provisional: of a row that asked for it, the block that is not finished: what stands at its new positions, the
        mask token where undecided.
      logprobs, context_logprobs: of `tokens`, if asked for; step_map: of `tokens`; all as in `Result`.
      error: why the row cannot go on; it is then gone, and has no result.
    """

    number: int
    block: int | None
    start: int
    tokens: list[int]
    steps: list[Step] | None
    accepted: int | None
    result: Result | None
    provisional: list[int] | None = None
    logprobs: list[TokenLogprob] | None = None
    step_map: list[int] | None = None
    context_logprobs: list[float] | None = None
    error: str | None = None


class Kind(NamedTuple):
    """Rows of one kind are made by one compiled function, together: their mode, block size and strategy, and the
    adapter whose weights they are made with, if any."""

    mode: str
    block_size: int
    strategy: jax.tree_util.PyTreeDef | None
    adapter: str | None = None


class Block:
    """What a call or several decided of a row's block: `step`, `log_probability` (S,) and `top`, as in
    `modes.Revealed`; and the denoiser's steps, if they are kept."""

    def __init__(self, size: int):
        self.step, self.log_probability = np.zeros(size, np.int32), np.zeros(size, np.float32)
        self.top: list[list[tuple[int, float]]] = [[] for _ in range(size)]
        self.steps: list[Step] = []
        self.evaluations = 0

    def add(self, emitted: Emitted, slot: int) -> None:
        step, log_probability, top = emitted.revealed
        places = np.flatnonzero(step[slot])
        self.step[places] = step[slot, places]
        if log_probability is not None:
            self.log_probability[places] = log_probability[slot, places]
        if top is not None:
            for place in places.tolist():
                self.top[place] = _pairs(top, (slot, place))


@dataclasses.dataclass
class Row:
    """A row's bookkeeping.

    Attributes:
      ids: of the prompt. to_read: what of it the context is to read; read: how much of that it has.
      end_tokens: that end it.
      borders: of its pieces, if there is a prefix cache.
      begun: whether a part of it was read, and not only found in a prefix cache.
      rule: the strategy with its knobs; None in modes without one.
      over: whether its first token, which reading the prompt gave, already ends it.
      fresh: whether it is to begin a block. evaluations: that its newest block took.
      guide: of a row that has a constraint. again: positions of its block that are masked again.
    """

    number: int
    request: Request
    ids: np.ndarray
    end_tokens: tuple[int, ...]
    ending: Ending
    keep_trace: bool
    mask_token_id: int

    def __post_init__(self):
        mode, sampling = self.request.mode, self.request.sampling
        self.blockwise = has_blocks(mode)
        self.rule: Strategy | None = sampling.rule if self.blockwise else None
        size = sampling.block_size if self.blockwise else 1
        strategy = jax.tree.structure(self.rule) if self.blockwise else None
        self.kind = Kind(mode, size, strategy, self.request.adapter)
        self.to_read = self.ids[:-1] if mode == "mock_ar" else self.ids
        self.read, self.begun = 0, False
        self.borders: list[bytes] = []
        self.over, self.fresh = False, True
        self.evaluations = 0
        self.tokens: list[int] = []
        self.denoiser_evaluations = self.context_evaluations = self.blocks = self.accepted = 0
        self.trace: list[Step] = []
        self.step_map: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.context_logprobs: list[float] = []
        self._block = Block(size)
        self.guide: Guide | None = None
        if self.request.constraint is not None:
            options = self.end_tokens, self.request.max_new_tokens, self.mask_token_id
            self.guide = Guide(self.request.constraint, *options)
        self.again = np.zeros(size, bool)

    @property
    def sample(self) -> int:
        """The number that with the seed decides the row's random keys."""
        return self.number if self.request.sample is None else self.request.sample

    @property
    def reading(self) -> bool:
        return self.read < max(1, len(self.to_read))

    @property
    def ready(self) -> bool:
        """Whether it can go on: its prompt is read, and what its next token depends on is known."""
        return not self.reading and not (self.guide and self.chooses_first and not self.tokens)

    @property
    def steps(self) -> int:
        """The evaluations that its block may take by now."""
        most = self.request.sampling.steps_per_block
        return max(most, self._block.evaluations + 1) if self.guide else most

    @property
    def chooses_first(self) -> bool:
        """Whether reading the prompt gives the first token."""
        return self.request.mode in ("ar", "speculative")

    @property
    def needs_state(self) -> bool:
        """Whether somebody reads the context's final state after the prompt: its head, or what diffusion is to tell of
        the context."""
        return self.chooses_first or self.request.context_logprobs

    @property
    def position(self) -> int:
        """The position of the next new token. The first one may be chosen already and not yet read."""
        return max(len(self.tokens), int(self.chooses_first and not self.reading))

    @property
    def given(self) -> int:
        """How many positions of a block are no new tokens."""
        return int(self.request.mode == "speculative")

    def first(self, chosen: Said, i: int) -> Progress:
        """The first token, row i of what reading prompts chose."""
        if not chosen.finite[i]:
            return self.failed()
        token = int(chosen.tokens[i])
        self.over = token in self.end_tokens or self.request.max_new_tokens == 1
        logprobs, context = self._tell([token], chosen.log_probability[i : i + 1], [_pairs(chosen.top, (i,))])
        self.step_map.append(0)
        self.tokens.append(token)
        if self.guide is not None:
            self.guide.advance([token])
        step_map = [0] if self.blockwise else None
        return Progress(
            self.number, None, 0, [token], None, None, None, None, logprobs, step_map, context_logprobs=context
        )

    def take(self, emitted: Emitted, slot: int) -> Progress | None:
        """What a call gave the row in this slot; None for nothing yet."""
        if not emitted.finite[slot]:
            return self.failed()
        number, before, count = self.blocks, len(self.tokens), int(emitted.count[slot])
        self.denoiser_evaluations += int(emitted.denoiser_evaluations[slot])
        self.context_evaluations += int(emitted.context_evaluations[slot])
        block = self._block
        block.evaluations += int(emitted.denoiser_evaluations[slot])
        if emitted.trace is not None:
            block.steps += _steps(emitted.trace, slot, number, self.mask_token_id)
        if self.blockwise:
            block.add(emitted, slot)
            self.fresh = count > 0
            if not count and not self.over:
                return self._unfinished(emitted, slot)
            self.evaluations, self._block = block.evaluations, Block(len(block.step))
        new = emitted.said.tokens[slot, :count].tolist()
        logprobs = context = None
        if self.request.tells:
            if self.request.mode == "diffusion":
                log_probability, top = block.log_probability, block.top
            else:
                log_probability = emitted.said.log_probability[slot]
                top = [_pairs(emitted.said.top, (slot, i)) for i in range(count)]
            logprobs, context = self._tell(new, log_probability, top, emitted.context, slot)
        accepted = None if emitted.accepted is None else int(emitted.accepted[slot])
        step_map = self._steps_of(block, count, accepted)
        self.step_map += step_map or []
        self.tokens += new
        if self.guide is not None:
            self.guide.advance(new)
            self.again = np.zeros_like(self.again)
        steps = None if emitted.trace is None else block.steps
        self.trace += steps or ()
        self.blocks += count > 0
        end = self.ending.look(self.tokens)
        if accepted is not None:
            self.accepted += min(accepted, max(0, len(self.tokens if end is None else end.tokens) - before))
        result = None if end is None else self._result(end)
        return Progress(self.number, number, before, new, steps, accepted, result, None, logprobs, step_map, context)

    def failed(self) -> Progress:
        """The row cannot go on."""
        error = f"prompt {self.number + 1}: the model's logits are not finite; are its weights?"
        return Progress(self.number, self.blocks, len(self.tokens), [], None, None, None, error=error)

    def _unfinished(self, emitted: Emitted, slot: int) -> Progress | None:
        if self.guide is not None:
            self.again = self.guide.settle(emitted.blocks.xt[slot].tolist(), self._block.log_probability)
        if not self.request.provisional:
            return None
        standing = emitted.blocks.xt[slot, self.given :]
        standing = np.where(self.again, self.mask_token_id, standing).tolist() if self.guide else standing.tolist()
        return Progress(self.number, self.blocks, len(self.tokens), [], None, None, None, standing)

    def _tell(self, tokens, log_probability, top, context=None, slot=0):
        """The log-probabilities of new tokens that the request asked for, and keeps them."""
        logprobs = thought = None
        count = self.request.logprobs
        if count is not None:
            logprobs = [
                TokenLogprob(token, float(log_probability[i]), top[i][:count]) for i, token in enumerate(tokens)
            ]
            self.logprobs += logprobs
        if self.request.context_logprobs:
            of_context = log_probability if self.request.mode != "diffusion" else context[slot]
            thought = [float(v) for v in of_context[: len(tokens)]]
            self.context_logprobs += thought
        return logprobs, thought

    def _steps_of(self, block: Block, count: int, accepted: int | None) -> list[int] | None:
        if not self.blockwise:
            return None
        if accepted is None:
            return block.step[:count].tolist()
        # The first position was given; the context said what comes after the drafts.
        return (block.step[1 : accepted + 1].tolist() + [0])[:count]

    def _result(self, end) -> Result:
        length, request = len(end.tokens), self.request
        return Result(
            prompt_ids=self.ids.tolist(),
            tokens=end.tokens,
            denoiser_evaluations=self.denoiser_evaluations,
            context_evaluations=self.context_evaluations,
            finish_reason=end.reason,
            text=end.text,
            blocks=self.blocks if self.blockwise else None,
            accepted_draft_tokens=self.accepted if request.mode == "speculative" else None,
            trace=self.trace if self.keep_trace and self.blockwise else None,
            logprobs=None if request.logprobs is None else self.logprobs[:length],
            step_map=self.step_map[:length] if self.blockwise else None,
            context_logprobs=self.context_logprobs[:length] if request.context_logprobs else None,
        )


def _pairs(top: tuple[np.ndarray, np.ndarray] | None, place: tuple[int, ...]) -> list[tuple[int, float]]:
    return [] if top is None else list(zip(top[0][place].tolist(), top[1][place].tolist(), strict=True))


def _steps(trace: Trace, slot: int, block: int, mask_token_id: int) -> list[Step]:
    return [
        Step(
            block,
            int(trace.step[i, slot]),
            float(trace.t[i, slot]),
            trace.xt[i, slot].tolist(),
            trace.tokens[i, slot].tolist(),
            trace.confidence[i, slot].tolist(),
            None if trace.routing is None else trace.routing[i, :, slot].tolist(),
            mask_token_id,
        )
        for i in np.flatnonzero(trace.active[:, slot]).tolist()
    ]
