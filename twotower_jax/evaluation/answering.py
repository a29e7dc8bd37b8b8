"""Who answers the questions of an evaluation: a model of this process at one operating point, or a server (served.py).

An answerer turns text into tokens, scores pairs and generates. It knows nothing of tasks.
"""

import dataclasses
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from tokenizers import Tokenizer

from twotower_jax.data import Decoder, encode
from twotower_jax.evaluation import likelihood
from twotower_jax.evaluation.answers import Answers
from twotower_jax.evaluation.likelihood import Pair, Scored
from twotower_jax.generation.engine import Engine, iter_steps, positions
from twotower_jax.generation.placement import TowerMeshes, in_force
from twotower_jax.generation.request import Request
from twotower_jax.generation.scheduling import PIECE
from twotower_jax.generation.settings import Settings
from twotower_jax.parameters import Params
from twotower_jax.progress import Counted
from twotower_jax.two_tower import TwoTower


class Asked(NamedTuple):
    """A text to be continued.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens, stop: where it ends.
      sample: numbers the samples of one prompt, which are drawn from different keys; 0 where nothing is drawn.
      temperature, top_k, top_p: as the task wants them; None leaves them to the operating point.
      ignore_end: goes on after end tokens, for timings.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sample: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    ignore_end: bool = False


class Answer(NamedTuple):
    """What came: the text, how many tokens it has, and how many passes of either tower it took."""

    text: str
    tokens: int
    evaluations: int


class Answerer(Protocol):
    """What an evaluation needs of whoever answers.

    Attributes:
      prefix: the token id that a text without a context is scored after.
      likelihood: one of `likelihood.KINDS`.
      label: of the lines that tell of progress; None for none.
      generated: counts "tokens" and "evaluations" of all that `generate` was asked for.
    """

    prefix: int
    likelihood: str
    label: str | None
    generated: Counter

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        ...

    def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        """The log-likelihood of each continuation."""
        ...

    def generate(self, asked: Sequence[Asked]) -> list[Answer]:
        """The answers in the order of the questions."""
        ...

    def run(self, asked: Sequence[Asked]) -> list[Answer]:
        """As `generate`, computed anew whatever is known: for timings."""
        ...


class Local:
    """A model of this process at one operating point.

    Args:
      settings: how to generate. Tokens and stops are each question's own, and temperature and filters if it says them.
      likelihood: see likelihood.py. The context tower decides the tokens of ar and speculative and of mock_ar it is the
        one that is checked: there the likelihood is `context` whatever is asked for.
      samples: of `bound`.
      answers: those known; None for a set of its own.
      label: of the lines that tell of progress; None for none.
    """

    def __init__(
        self,
        model: TwoTower,
        params: Params,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        placement: TowerMeshes = TowerMeshes(),  # noqa: B008 (frozen)
        likelihood: str = "context",
        samples: int = 32,
        answers: Answers | None = None,
        label: str | None = None,
    ):
        check_likelihood(likelihood, settings)
        self._model, self._params, self._tokenizer, self._placement = model, params, tokenizer, placement
        self._decode, self._settings, self._samples = Decoder(tokenizer), settings, samples
        self._answers, self.label = Answers() if answers is None else answers, label
        self.likelihood = likelihood if settings.mode == "diffusion" else "context"
        self.prefix = model.config.bos_token_id
        self.generated: Counter = Counter()

    def encode(self, text: str) -> list[int]:
        return encode(self._tokenizer, [text])[0].tolist()

    def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        keys = [self._answers.key("likelihood", *self._scoring(), pair) for pair in pairs]
        new = {key: pair for key, pair in zip(keys, pairs, strict=True) if self._answers.get(key) is None}
        if new:
            with self._counted(f"likelihood ({self.likelihood})", len(new)) as count:
                names = list(new)

                def done(number: int, scored: Scored) -> None:
                    self._answers.add(names[number], scored)
                    count(1)

                self._score(list(new.values()), done)
        return [Scored(*self._answers.get(key)) for key in keys]

    def generate(self, asked: Sequence[Asked]) -> list[Answer]:
        keys = [self._answers.key("generation", self._generating(), one) for one in asked]
        new = {key: one for key, one in zip(keys, asked, strict=True) if self._answers.get(key) is None}
        if new:
            with self._counted("generation", len(new)) as count:
                names = list(new)

                def done(number: int, answer: Answer) -> None:
                    self._answers.add(names[number], answer)
                    count(1)

                self._generate(list(new.values()), done)
        found = [Answer(*self._answers.get(key)) for key in keys]
        for answer in found:
            self.generated.update(tokens=answer.tokens, evaluations=answer.evaluations)
        return found

    def run(self, asked: Sequence[Asked]) -> list[Answer]:
        found: dict[int, Answer] = {}
        self._generate(asked, found.__setitem__)
        return [found[number] for number in range(len(asked))]

    def _scoring(self) -> list:
        """What a likelihood depends on beside the pair."""
        if self.likelihood == "context":
            return [self.likelihood]
        sampling = dataclasses.asdict(self._settings.sampling)
        if self.likelihood == "bound":
            return [self.likelihood, sampling["block_size"], self._samples, self._settings.seed]
        return [self.likelihood, sampling]

    def _generating(self) -> dict:
        """What an answer depends on beside the question."""
        settings = dataclasses.asdict(self._settings)
        for name in ("batch_size", "prefill_chunk", "max_cache_gb", "max_new_tokens", "stop"):
            del settings[name]
        return settings

    def _score(self, pairs: Sequence[Pair], done: likelihood.Done) -> None:
        settings = self._settings
        options = {"batch_size": settings.batch_size}
        with in_force(self._placement.context):
            params = self._placement.context_params(self._model, self._params)
            if self.likelihood == "context":
                likelihood.context_scores(self._model, params, pairs, done, **options)
            elif self.likelihood == "bound":
                options |= {"block_size": settings.sampling.block_size, "samples": self._samples}
                likelihood.bound_scores(self._model, params, pairs, done, seed=settings.seed, **options)
            else:
                likelihood.blockwise_scores(self._model, params, pairs, done, sampling=settings.sampling, **options)

    def _generate(self, asked: Sequence[Asked], done: Callable[[int, Answer], None]) -> None:
        """Questions of similar length together, so that one long one does not make all caches long. Few capacities
        occur, each of which compiles anew."""
        lengths = defaultdict(list)
        requests = [self._request(one) for one in asked]
        for number, r in enumerate(requests):
            needed = positions(len(r.prompt), r.max_new_tokens, self._settings, r)
            lengths[max(PIECE, 1 << (needed - 1).bit_length())].append(number)
        for capacity, numbers in sorted(lengths.items()):
            engine = Engine(
                self._model,
                self._params,
                self._settings,
                capacity=capacity,
                slots=min(self._settings.batch_size, len(numbers)),
                decode=self._decode,
                placement=self._placement,
            )
            for number in numbers:
                engine.submit(requests[number])
            for progress in (one for steps in iter_steps(engine) for one in steps):
                if progress.error is not None:
                    raise FloatingPointError(progress.error)
                if (result := progress.result) is not None:
                    evaluations = result.denoiser_evaluations + result.context_evaluations
                    done(numbers[progress.number], Answer(result.text, len(result.tokens), evaluations))

    def _request(self, one: Asked) -> Request:
        told = {name: getattr(one, name) for name in ("temperature", "top_k", "top_p")}
        told = {name: value for name, value in told.items() if value is not None}
        return Request(
            prompt=one.prompt,
            max_new_tokens=one.max_new_tokens,
            mode=self._settings.mode,
            sampling=dataclasses.replace(self._settings.sampling, **told),
            seed=self._settings.seed,
            # Questions draw apart from each other, and each the same wherever it stands.
            sample=zlib.crc32(np.asarray(one.prompt, np.int32).tobytes(), one.sample),
            tolerance=self._settings.tolerance,
            stop=one.stop,
            end_tokens=() if one.ignore_end else None,
        )

    def _counted(self, what: str, total: int) -> "Counting":
        return Counting(None if self.label is None else f"{self.label}: {what}", total)


class Counting:
    """Tells of progress while work goes on, if it has a label."""

    def __init__(self, label: str | None, total: int):
        self._progress = None if label is None else Counted(label, total)

    def __enter__(self) -> Callable[[int], None]:
        return self._progress.add if self._progress is not None else lambda count: None

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._progress is not None and kind is None:
            self._progress.finish()
        elif self._progress is not None and sys.stderr.isatty():
            print(file=sys.stderr)


def check_likelihood(kind: str, settings: Settings) -> None:
    """Refuses a likelihood that there is not, or that the point's strategy does not have.

    Raises:
      ValueError: naming it.
    """
    if kind not in likelihood.KINDS:
        raise ValueError(f"likelihood={kind!r} is not one of {', '.join(likelihood.KINDS)}")
    ordered = settings.sampling.strategy in likelihood.ORDERED
    if kind == "blockwise" and settings.mode == "diffusion" and not ordered:
        raise ValueError(
            f"likelihood=blockwise needs one of the strategies {', '.join(likelihood.ORDERED)}, whose commits follow "
            f"from the predictions alone, not {settings.sampling.strategy}"
        )
