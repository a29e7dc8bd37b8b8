"""Watching rows fill in: one line per row, drawn again and again on a terminal, or one line per block elsewhere.

A block is computed in one call, so its steps are shown when it is done, one after another.
"""

import shutil
import time
from collections.abc import Sequence
from typing import TextIO

from twotower_jax.generation.rows import Progress
from twotower_jax.generation.settings import Step
from twotower_jax.generation.stops import Decode

_UNDECIDED = "░"
# Tokens of a row that are kept: more than a terminal is wide, so that drawing costs the same however long a row is.
_KEPT = 4096


class Watch:
    """Shows what rows get.

    Args:
      prompts: token ids.
      decode: tokens to text; None shows ids.
      stream: to draw on; a terminal is redrawn.
      given: positions at the beginning of each block that are no new tokens.
      rows: at most this many are drawn at a time.
      delay: seconds between the steps of a block, on a terminal.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        decode: Decode | None,
        mask_id: int,
        stream: TextIO,
        *,
        given: int = 0,
        rows: int = 12,
        delay: float = 0.04,
    ):
        self._decode = decode or (lambda ids: "".join(f" {i}" for i in ids))
        self._mask_id, self._stream, self._given, self._delay = mask_id, stream, given, delay
        self._tokens = {number: [int(i) for i in ids] for number, ids in enumerate(prompts)}
        self._rows, self._drawn = rows, 0
        self._running: list[int] = []

    def show(self, progress: Sequence[Progress]) -> None:
        """Shows what one call of `Engine.step` gave."""
        for p in progress:
            if p.block is None:
                self._tokens[p.number] += p.tokens
        progress = [p for p in progress if p.block is not None]
        terminal = self._stream.isatty()
        if terminal and progress:
            # Rows that got nothing are still at their block, and stay as they are.
            numbers = [p.number for p in progress]
            self._running += [n for n in numbers if n not in self._running]
            for k in range(max(len(p.steps or ()) for p in progress)):
                during = {p.number: self._during(p, k) for p in progress if p.steps}
                self._draw([(n, during.get(n) or self._text(self._tokens[n])) for n in self._running])
                time.sleep(self._delay)
        for p in progress:
            self._tokens[p.number] += p.tokens
            del self._tokens[p.number][:-_KEPT]
        if terminal and progress:
            # Rows that are done stay where they are; the next block is drawn below them.
            done = [p.number for p in progress if p.result is not None]
            going = [n for n in self._running if n not in done]
            self._draw([(n, self._text(self._tokens[n])) for n in done + going])
            self._drawn -= len(done[: self._rows])
            self._running = going
            return
        for p in progress:
            evaluations = f", {len(p.steps)} steps" if p.steps else ""
            kept = "" if p.accepted is None else f", {p.accepted} drafted tokens kept"
            end = "" if p.result is None else f", ended by {p.result.finish_reason}"
            text = self._text(p.tokens)
            print(f"row {p.number}, block {p.block}{evaluations}{kept}{end}: {text}", file=self._stream)
        self._stream.flush()

    def _during(self, progress: Progress, k: int) -> str:
        step: Step = progress.steps[min(k, len(progress.steps) - 1)]
        return self._text(self._tokens[progress.number] + step.tokens[self._given :])

    def _text(self, tokens: Sequence[int]) -> str:
        """Tokens on one line, blocks where they are undecided."""
        out, run = [], []
        for token in [*tokens, self._mask_id]:
            if token != self._mask_id:
                run.append(token)
                continue
            out += [self._decode(run) if run else "", _UNDECIDED]
            run = []
        text = "".join(out[:-1]).replace("\n", "⏎")
        return "".join(c if c.isprintable() else " " for c in text)

    def _draw(self, lines: list[tuple[int, str]]) -> None:
        """Draws lines over those drawn before, the end of each if it is too long."""
        width = shutil.get_terminal_size().columns
        lines = lines[: self._rows]
        out = [f"\x1b[{self._drawn}A\r" if self._drawn else "\r"]
        for number, text in lines:
            label = f"{number}: "
            room = max(8, width - len(label) - 1)
            out.append(f"\x1b[2K{label}{text if len(text) <= room else '…' + text[1 - room :]}\n")
        out.append("\x1b[J")
        self._stream.write("".join(out))
        self._stream.flush()
        self._drawn = len(lines)
