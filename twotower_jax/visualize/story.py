"""A trace file read back, one row of it, as the frames that a page or an animation shows one after another."""

import dataclasses
import json
import math
import pathlib
from typing import Any, NamedTuple

from twotower_jax.generation.trace import FORMAT, VERSION
from twotower_jax.paths import as_path

_VERSIONS = (1, VERSION)  # 1 has no routing.

DRAWN_MODES = ("diffusion", "speculative")


class TraceError(ValueError):
    """A trace that is broken; the message names file and line."""


class Cell(NamedTuple):
    """A position: its token or None while masked, the step (from 0) that decided it and how sure that step was.

    `step` and `confidence` are None of tokens that the context tower chose.
    """

    token: int | None
    step: int | None = None
    confidence: float | None = None


class Frame(NamedTuple):
    """One moment. The row's new tokens are the first `settled` of `Story.cells`, then `cells`, the block at work.

    `step` counts evaluations of the block: 0 before the first one; None when the block is done and read. `load` says of
    the evaluation before, for each layer with experts, how many positions went to each of its E experts.
    """

    block: int
    step: int | None
    t: float | None
    settled: int
    cells: list[Cell]
    load: list[list[int]] | None = None


class Block(NamedTuple):
    """What became of a block: its draft, of which `kept` from `offset` on stayed, and the steps it took."""

    number: int
    steps: int
    draft: list[Cell]
    offset: int
    kept: int


@dataclasses.dataclass
class Story:
    """One row of a trace.

    Attributes:
      header: the trace's first line.
      row: its number.
      prompt_ids, prompt: the prompt's tokens, and its text if the trace has it.
      frames, blocks: in order.
      cells: all new tokens, those after the row's end included.
      length: how many of them the row keeps.
      reason: why it ended.
      texts: of each token id that occurs; empty where the trace was made without a tokenizer.
    """

    header: dict[str, Any]
    row: int
    prompt_ids: list[int] = dataclasses.field(default_factory=list)
    prompt: str | None = None
    frames: list[Frame] = dataclasses.field(default_factory=list)
    blocks: list[Block] = dataclasses.field(default_factory=list)
    cells: list[Cell] = dataclasses.field(default_factory=list)
    length: int = 0
    reason: str = ""
    texts: dict[int, str] = dataclasses.field(default_factory=dict)

    def text(self, token: int) -> str:
        """What is shown of a token: its text, or its number."""
        return self.texts.get(token, f"{token} ")

    @property
    def prompt_text(self) -> str:
        return self.prompt if self.prompt is not None else "".join(f"{i} " for i in self.prompt_ids)

    @property
    def load(self) -> list[list[int]] | None:
        """The sum of the frames' loads; None where the trace has no routing."""
        loads = [frame.load for frame in self.frames if frame.load is not None]
        return [[sum(counts) for counts in zip(*layer, strict=True)] for layer in zip(*loads, strict=True)] or None

    @property
    def most_steps(self) -> int:
        return max((block.steps for block in self.blocks), default=0)


def read_story(path: str | pathlib.Path, row: int = 0) -> Story:
    """One row of a trace.

    Raises:
      TraceError: naming file and line, if the trace is broken.
      ValueError: if there is no such file, its version or mode cannot be drawn, or it has no such row or no step of it.
    """
    path = as_path(path)
    if not path.exists() or path.is_dir():
        raise ValueError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a trace")
    reader, number = None, 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line.decode("utf-8"))
                if not isinstance(value, dict):
                    raise TraceError(f"expected a JSON object, found {type(value).__name__}")
                if reader is None:
                    reader = _Reader(_header(value, path, row), row)
                else:
                    reader.add(value)
            except KeyError as error:
                raise TraceError(f"{path}, line {number}: {error.args[0]!r} is missing") from None
            except (TraceError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise TraceError(f"{path}, line {number}: {error}") from None
    if reader is None:
        raise TraceError(f"{path}, line 1: the file is empty")
    if not reader.story.reason:
        raise TraceError(f"{path}, line {number}: the trace ends before the result of row {row}; is it cut off?")
    if not reader.story.frames:
        raise ValueError(f"{path}: row {row} ended with its first token, before any denoiser step")
    return reader.story


def _header(value: dict, path: pathlib.Path, row: int) -> dict:
    if value.get("format") != FORMAT:
        raise TraceError(f"expected the header of a trace, with format {FORMAT!r}")
    prompts = _number(value, "prompts")
    if _number(value, "block_size") < 1:
        raise TraceError("block_size must be at least 1")
    _number(value, "mask_token_id")
    if value.get("version") not in _VERSIONS:
        versions = " and ".join(map(str, _VERSIONS))
        raise ValueError(f"{path}: version {value.get('version')!r} of the format; this program draws {versions}")
    if value.get("mode") not in DRAWN_MODES:
        modes = " or ".join(DRAWN_MODES)
        raise ValueError(f"{path}: mode {value.get('mode')!r} has no denoiser steps to draw; trace --mode={modes}")
    if not 0 <= row < prompts:
        raise ValueError(f"{path}: there is no row {row}; the trace has {prompts}, counted from 0")
    return value


class _Reader:
    """Lines to a story. `add` raises TraceError, without file and line, and KeyError."""

    def __init__(self, header: dict, row: int):
        self.story = Story(header, row)
        self._mask, self._size = header["mask_token_id"], header["block_size"]
        self._draft: list[Cell] = []
        self._steps = self._start = 0
        self._layers: int | None = None

    def add(self, line: dict) -> None:
        kind = line["kind"]
        if kind == "texts":
            self._texts(line["texts"])
        elif kind not in ("prompt", "step", "block", "result"):
            raise TraceError(f"unknown kind {kind!r}")
        elif _number(line, "row") == self.story.row:
            if self.story.reason:
                raise TraceError(f"row {self.story.row} goes on after its result")
            getattr(self, f"_{kind}")(line)

    def _prompt(self, line: dict) -> None:
        self.story.prompt_ids, self.story.prompt = _tokens(line, "ids"), line["text"]
        if not isinstance(self.story.prompt, str | None):
            raise TraceError("text must be a string or null")

    def _step(self, line: dict) -> None:
        before, after = (_tokens(line, name, self._size) for name in ("xt", "tokens"))
        confidence, committed = line["confidence"], _tokens(line, "committed")
        if not isinstance(confidence, list) or len(confidence) != self._size or not all(map(_is_real, confidence)):
            raise TraceError(f"confidence must hold {self._size} numbers")
        if any(i >= self._size for i in committed):
            raise TraceError(f"committed must hold positions below {self._size}")
        block, step, start = (_number(line, name) for name in ("block", "step", "start"))
        if block != len(self.story.blocks) or step != self._steps:
            raise TraceError(
                f"step {step} of block {block} where step {self._steps} of {len(self.story.blocks)} is due"
            )
        if start > len(self.story.cells):
            raise TraceError(f"start {start} is after the row's {len(self.story.cells)} tokens")
        if not _is_real(line["t"]):
            raise TraceError("t must be a number")
        if step == 0:
            self._start = start
            self._draft = [Cell(None if token == self._mask else token) for token in before]
            self._frame(block, 0, line["t"])
        for i, token in enumerate(after):
            if token == self._mask:  # Undecided, or masked again.
                self._draft[i] = Cell(None)
        for i in committed:
            self._draft[i] = Cell(after[i], step, confidence[i])
        self._steps = step + 1
        self._frame(block, self._steps, after.count(self._mask) / self._size, self._load(line.get("experts")))

    def _block(self, line: dict) -> None:
        tokens, start, cells = _tokens(line, "tokens"), _number(line, "start"), self.story.cells
        if start != len(cells):
            raise TraceError(f"start {start} where the row has {len(cells)} tokens")
        if line["block"] is None:  # The first token of speculative mode, which reading the prompt gives.
            cells += [Cell(token) for token in tokens]
            return
        if _number(line, "block") != len(self.story.blocks):
            raise TraceError(f"block {line['block']} where block {len(self.story.blocks)} is due")
        offset = start - self._start if self._draft else 0
        accepted = line["accepted"]
        kept = len(tokens) if accepted is None else _number(line, "accepted")
        drafted = self._draft[offset:]
        if accepted is None and len(drafted) != len(tokens) or kept > len(drafted):
            raise TraceError(f"{len(tokens)} tokens, {kept} of them drafted, do not fit the block's steps")
        for i, token in enumerate(tokens):
            cells.append(drafted[i] if i < kept and drafted[i].token == token else Cell(token))
        self.story.blocks.append(Block(len(self.story.blocks), self._steps, self._draft, offset, kept))
        self.story.frames.append(Frame(len(self.story.blocks) - 1, None, None, len(cells), []))
        self._draft, self._steps = [], 0

    def _result(self, line: dict) -> None:
        tokens, reason = _tokens(line, "tokens"), line["finish_reason"]
        if not isinstance(reason, str) or not reason:
            raise TraceError("finish_reason must be a text")
        if tokens != [cell.token for cell in self.story.cells[: len(tokens)]]:
            raise TraceError("the result's tokens are not those of its blocks")
        self.story.length, self.story.reason = len(tokens), reason

    def _texts(self, texts: Any) -> None:
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise TraceError("texts must be an object of strings")
        try:
            self.story.texts = {int(token): text for token, text in texts.items()}
        except ValueError:
            raise TraceError("the keys of texts must be token ids") from None

    def _load(self, experts: Any) -> list[list[int]] | None:
        if experts is None:
            return None
        size = _number(self.story.header, "n_routed_experts")
        layers = [_tokens({"experts": layer}, "experts") for layer in experts] if isinstance(experts, list) else []
        if not layers or any(e >= size for layer in layers for e in layer):
            raise TraceError(f"experts must hold a list of numbers below {size} for each layer")
        if self._layers not in (None, len(layers)):
            raise TraceError(f"experts of {len(layers)} layers after those of {self._layers}")
        self._layers = len(layers)
        return [[layer.count(e) for e in range(size)] for layer in layers]

    def _frame(self, block: int, step: int, t: float, load: list[list[int]] | None = None) -> None:
        self.story.frames.append(Frame(block, step, t, self._start, list(self._draft), load))


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(line: dict, name: str) -> int:
    value = line[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TraceError(f"{name} must be a whole number of at least 0, not {value!r}")
    return value


def _tokens(line: dict, name: str, count: int | None = None) -> list[int]:
    values = line[name]
    if not isinstance(values, list) or not all(
        isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values
    ):
        raise TraceError(f"{name} must be a list of whole numbers")
    if count is not None and len(values) != count:
        raise TraceError(f"{name} must hold {count} tokens, one per position of the block, not {len(values)}")
    return values
