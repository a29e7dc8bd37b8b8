"""What a caller says and gets: settings, and the result of each row."""

import dataclasses
import math
from typing import Any, NamedTuple

from twotower_jax.choices import MODES
from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import SamplingConfig


def has_blocks(mode: str) -> bool:
    """Whether the mode makes blocks with the denoiser, and not one token at a time."""
    return mode in ("diffusion", "speculative")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to generate.

    Attributes:
      mode: "diffusion"; "ar" (the context tower alone); "speculative" (the denoiser drafts, the context decides: the
        tokens of "ar", see speculative.py); or "mock_ar" (the denoiser, one token at a time; a check).
      max_new_tokens: of each row; need not be a multiple of the block.
      sampling: block size, steps, strategy, temperature and filters; one-token modes use the latter two.
      seed: with a row's number the only source of randomness.
      batch_size: rows computed together; no row's tokens depend on it.
      ignore_eos: go on after an end-of-text token.
      eos: the tokens that end a row in place of the checkpoint's; None takes those.
      stop: texts that end a row; needs a way to turn tokens into text, see `Engine`.
      prefill_chunk: prompts are read in pieces of at most this many tokens.
      tolerance: of mode "speculative", 0 … 1: how much less probable than AR's best token a drafted one may be.
      max_cache_gb: refuse to start if the caches need more (GB of 10⁹ bytes); None asks the device.

    Raises:
      ValueError: at construction, naming the value.
    """

    mode: str = "diffusion"
    max_new_tokens: int = 64
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    batch_size: int = 8
    ignore_eos: bool = False
    eos: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    prefill_chunk: int = 512
    tolerance: float = 0.0
    max_cache_gb: float | None = None

    def __post_init__(self):
        check_row(self)
        for name in ("batch_size", "prefill_chunk"):
            if not 1 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be at least 1 and less than 2**31, not {getattr(self, name)}")
        if self.eos is not None and (not self.eos or min(self.eos) < 0):
            raise ValueError(f"eos must hold token ids, at least one, not {self.eos!r}")
        if self.eos is not None and self.ignore_eos:
            raise ValueError(f"eos={self.eos!r} changes nothing with ignore_eos: give one of the two")
        if self.max_cache_gb is not None and not 0 < self.max_cache_gb < math.inf:
            raise ValueError(f"max_cache_gb must be a number of more than 0, not {self.max_cache_gb}")

    def end_tokens(self, config: ModelConfig) -> tuple[int, ...]:
        """The tokens that end a row of a model of this configuration.

        Raises:
          ValueError: if one of `eos` lies outside the vocabulary.
        """
        if self.ignore_eos:
            return ()
        if self.eos is None:
            return config.eos_token_ids
        if max(self.eos) >= config.vocab_size:
            raise ValueError(f"eos={max(self.eos)} lies outside vocab_size={config.vocab_size}")
        return self.eos


def check_row(asked: Any) -> None:
    """Checks what both say of a row.

    Args:
      asked: a `Settings` or a `Request`.

    Raises:
      ValueError: naming the value.
    """
    mode, seed, stop, tolerance = asked.mode, asked.seed, asked.stop, asked.tolerance
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; the modes are {', '.join(MODES)}")
    if not 1 <= asked.max_new_tokens < 2**31:
        raise ValueError(f"max_new_tokens must be at least 1 and less than 2**31, not {asked.max_new_tokens}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must lie in [0, 2**32), not {seed}")
    if isinstance(stop, str) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop must hold texts that are not empty, not {stop!r}")
    if not 0 <= tolerance <= 1:
        raise ValueError(f"tolerance must lie in [0, 1], not {tolerance}")
    if tolerance and mode != "speculative":
        raise ValueError(f"tolerance={tolerance} changes nothing in mode {mode!r}")
    if mode == "speculative" and asked.sampling.block_size < 2:
        raise ValueError("mode speculative needs a block_size of at least 2: the first token of a block is given")


class TokenLogprob(NamedTuple):
    """What the tower that said a token thought of it then.

    Attributes:
      token: its id.
      logprob: its log-probability, natural, without temperature and filters.
      top: the most probable tokens there, best first, and their log-probabilities.
    """

    token: int
    logprob: float
    top: list[tuple[int, float]] = []


class Step(NamedTuple):
    """One evaluation of the denoiser on one row.

    Attributes:
      block, step: numbers, both from 0.
      t: the masked fraction before the step, which the denoiser is told.
      xt: the block's S tokens before the step, the mask token where undecided.
      tokens: the same after the step.
      confidence: the probability of the token chosen at each position; says nothing where xt was decided.
      mask_token_id: what marks undecided positions; a strategy may mask a token again.
      experts: if asked for, those that each layer with experts used: (layers, S, k) numbers, of a position best first.
    """

    block: int
    step: int
    t: float
    xt: list[int]
    tokens: list[int]
    confidence: list[float]
    experts: list[list[list[int]]] | None = None
    mask_token_id: int | None = None

    @property
    def committed(self) -> list[int]:
        """The positions that the step decided; not those that it masked again."""
        pairs = enumerate(zip(self.xt, self.tokens, strict=True))
        return [i for i, (before, after) in pairs if before != after != self.mask_token_id]


class Result(NamedTuple):
    """One row.

    Attributes:
      prompt_ids, tokens: the new tokens only, cut after the first end token, or after the token with which a
        stop text is complete.
      denoiser_evaluations, context_evaluations: passes of each tower that this row needed, the prompt's being one.
      finish_reason: "eos", "stop" or "length".
      text: of the tokens, cut before the stop text; None where nothing turns tokens into text.
      blocks: of diffusion and speculative, how many were denoised.
      accepted_draft_tokens: of speculative, how many of `tokens` were drafted by the denoiser and kept.
      trace: the denoiser's steps, if asked for.
      logprobs: of each of `tokens`, if the request asked for them: under the tower that said it, in diffusion of the
        step that committed it; of a token that was given, under the tower that would have said it, or 0 in diffusion.
      step_map: of diffusion and speculative, for each token the evaluation of its block that committed it, from 1; 0
        for one that was given, or that the context said.
      context_logprobs: of each token, under the context given all before it, if asked for.
    """

    prompt_ids: list[int]
    tokens: list[int]
    denoiser_evaluations: int
    context_evaluations: int
    finish_reason: str
    text: str | None = None
    blocks: int | None = None
    accepted_draft_tokens: int | None = None
    trace: list[Step] | None = None
    logprobs: list[TokenLogprob] | None = None
    step_map: list[int] | None = None
    context_logprobs: list[float] | None = None

    @property
    def evaluations_per_token(self) -> float:
        """Passes of either tower for each new token."""
        return (self.denoiser_evaluations + self.context_evaluations) / len(self.tokens)

    @property
    def acceptance_length(self) -> float | None:
        """Mean number of drafted tokens kept per block, in speculative mode."""
        return None if self.accepted_draft_tokens is None else self.accepted_draft_tokens / max(1, self.blocks)
