"""What one row is asked to be. Requests of one engine may differ in everything said here."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from twotower_jax.config import ModelConfig
from twotower_jax.diffusion import SamplingConfig
from twotower_jax.generation.automaton import Automaton
from twotower_jax.generation.settings import Settings, check_row, has_blocks
from twotower_jax.tokens import check_ids

# The most alternatives that a request may ask for at each token.
MOST_ALTERNATIVES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to continue it. Positions are counted from the first new token, which is 0.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens, mode, seed, tolerance: as of `Settings`.
      sampling: block size, steps, strategy with knobs, temperature and filters; modes of one token use the latter two.
      sample: with the seed the only source of the row's randomness; None takes the engine's number of the row.
      end_tokens: that end the row; None takes the engine's, () none.
      stop: texts that end it; they need an engine with a `decode`.
      pinned: position → token id. The token stands there and conditions the others: in blocks those on both sides.
      allowed: position → token ids, one of which is to stand there, at least one each; other positions are free. The
        denoiser's own mask token is never said, and is no use here in diffusion.
      start: tokens at the first positions to begin with, the mask token where undecided; strategies may change them.
        Of diffusion alone.
      constraint: the rows that may be said, of which this is to be one; an end token follows, unless none has room.
        Nothing else may then be said of positions, nor a stop text; and not in speculative mode.
      logprobs: tell of each token its log-probability, and of so many of the most probable ones; None tells nothing.
      context_logprobs: tell of each token its exact log-probability under the context tower.
      provisional: tell of every step of a block; in modes of one token at a time, of every token alone.
      adapter: the name of one of the engine's adapters, beside whose weights the row is made; None for none.

    Raises:
      ValueError: at construction, naming the value. What depends on the model, `check` finds.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    mode: str = "diffusion"
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    seed: int = 0
    sample: int | None = None
    tolerance: float = 0.0
    end_tokens: tuple[int, ...] | None = None
    stop: tuple[str, ...] = ()
    pinned: Mapping[int, int] = dataclasses.field(default_factory=dict)
    allowed: Mapping[int, Collection[int]] | None = None
    start: Sequence[int] | None = None
    constraint: Automaton | None = None
    logprobs: int | None = None
    context_logprobs: bool = False
    provisional: bool = False
    adapter: str | None = None

    def __post_init__(self):
        check_row(self)
        if self.sample is not None and not 0 <= self.sample < 2**32:
            raise ValueError(f"sample must lie in [0, 2**32), not {self.sample}")
        if self.start is not None and self.mode != "diffusion":
            raise ValueError(f"start changes nothing in mode {self.mode!r}: only diffusion begins with a block")
        if self.context_logprobs and self.mode == "mock_ar":
            raise ValueError("context_logprobs are not to be had in mode 'mock_ar', which is a check of the denoiser")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_ALTERNATIVES:
            raise ValueError(f"logprobs must lie in [0, {MOST_ALTERNATIVES}], not {self.logprobs}")
        for name in ("pinned", "allowed"):
            if outside := [p for p in getattr(self, name) or () if not 0 <= p < self.max_new_tokens]:
                last = self.max_new_tokens - 1
                raise ValueError(f"{name}: there is no position {outside[0]}; new tokens have 0 … {last}")
        if self.start is not None and not 0 < len(self.start) <= self.max_new_tokens:
            raise ValueError(f"start must hold 1 … {self.max_new_tokens} token ids, not {len(self.start)}")
        if self.constraint is not None:
            self._check_constraint()

    def _check_constraint(self) -> None:
        if self.mode == "speculative":
            raise ValueError(
                "constraint: what may follow a draft is not known before it is read: not in mode 'speculative'"
            )
        if names := [name for name in ("pinned", "allowed", "start", "stop") if getattr(self, name)]:
            raise ValueError(f"constraint: with it {names[0]} cannot be given")

    @property
    def holds(self) -> bool:
        """Whether it says something of single positions."""
        return bool(self.pinned or self.allowed or self.start or self.constraint)

    @property
    def tells(self) -> bool:
        """Whether log-probabilities are wanted."""
        return self.logprobs is not None or self.context_logprobs

    def check(self, config: ModelConfig) -> None:
        """Refuses what a model of this configuration cannot do.

        Raises:
          ValueError: saying what.
        """
        for name in ("pinned", "allowed"):
            for position, ids in (getattr(self, name) or {}).items():
                check_ids([ids] if name == "pinned" else list(ids), config.vocab_size, f"{name}[{position}]")
        check_ids(list(self.start or ()), config.vocab_size, "start")
        check_ids(list(self.end_tokens or ()), config.vocab_size, "end_tokens")
        if self.sampling.top_k > config.vocab_size:
            raise ValueError(f"top_k={self.sampling.top_k} is more than the vocabulary has: {config.vocab_size}")
        if (self.logprobs or 0) > config.vocab_size:
            raise ValueError(f"logprobs={self.logprobs} is more than the vocabulary has: {config.vocab_size}")
        mask = config.mask_token_id if has_blocks(self.mode) else None
        for position, token in self.pinned.items():
            if token == mask:
                raise ValueError(
                    f"pinned[{position}]={token} is the mask token, which stands for an undecided position"
                )
        if self.constraint is not None:
            check_ids(self.constraint.said, config.vocab_size, "constraint")
            if mask is not None and self.constraint.says(mask):
                raise ValueError("constraint holds the mask token, which stands for an undecided position")
        for position, ids in (self.allowed or {}).items():
            if not set(ids) - {mask}:
                raise ValueError(f"allowed[{position}] holds no token that may stand there")
            if position in self.pinned and self.pinned[position] not in ids:
                raise ValueError(f"pinned[{position}]={self.pinned[position]} is not among those allowed there")
        for position, token in enumerate(self.start or ()):
            pinned, allowed = self.pinned.get(position, token), (self.allowed or {}).get(position, (token,))
            if token != mask and (token != pinned or token not in allowed):
                raise ValueError(f"start[{position}]={token} is not what is pinned or allowed there")


def from_settings(settings: Settings, prompt: Sequence[int], max_new_tokens: int | None = None) -> Request:
    """A request for what an engine's settings say."""
    return Request(
        prompt=prompt,
        max_new_tokens=settings.max_new_tokens if max_new_tokens is None else max_new_tokens,
        mode=settings.mode,
        sampling=settings.sampling,
        seed=settings.seed,
        tolerance=settings.tolerance,
        stop=settings.stop,
    )
