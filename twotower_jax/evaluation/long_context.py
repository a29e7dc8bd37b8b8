"""Long contexts, made on the spot and of any length: a needle in a haystack, and a value by its key.

needle      one sentence that gives a name its number stands among others that say nothing of it, at evenly spaced
            depths over the questions; the prompt ends with that sentence's beginning
key_value   a list of pairs of random digits; the prompt ends with one of the keys (Liu et al. 2023, arXiv 2307.03172)

A prompt has at most as many tokens as its length says, and less than one sentence or pair fewer.
"""

import random
from collections.abc import Callable, Sequence

from twotower_jax.evaluation.answering import Answerer
from twotower_jax.evaluation.made import MadeTask, Question

_NAMES = ["Anna", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hugo", "Ida", "Jon", "Kim", "Leo"]
_PLACES = ["garden", "harbor", "kitchen", "library", "market", "museum", "office", "orchard", "station", "theater"]
_ADJECTIVES = ["bright", "cold", "dusty", "empty", "green", "narrow", "old", "quiet", "small", "warm"]
_VERBS = ["cleans", "crosses", "draws", "forgets", "leaves", "likes", "passes", "remembers", "sees", "visits"]
_DIGITS = 4
KINDS = ("needle", "key_value")


def long_tasks(kind: str, lengths: Sequence[int], count: int, seed: int = 0) -> list[MadeTask]:
    """A task for each length, called KIND_LENGTH.

    Args:
      lengths: tokens of a prompt.
      count: questions of each.

    Raises:
      ValueError: for a kind that there is not.
    """
    if kind not in KINDS:
        raise ValueError(f"long context: there is no {kind!r}; there are {', '.join(KINDS)}")
    make = _needle if kind == "needle" else _key_value

    def of(length: int) -> MadeTask:
        def questions(answerer: Answerer) -> list[Question]:
            return [
                make(random.Random(f"{kind} {length} {seed} {n}"), length, n, count, answerer) for n in range(count)
            ]

        return MadeTask(f"{kind}_{length}", questions)

    return [of(length) for length in lengths]


def _needle(rng: random.Random, length: int, number: int, count: int, answerer: Answerer) -> Question:
    name, value = rng.choice(_NAMES), _digits(rng)
    needle, end = f"The number of {name} is {value}.", f" The number of {name} is"

    def text(sentences: list[str]) -> str:
        depth = round(len(sentences) * number / max(1, count - 1))
        return " ".join([*sentences[:depth], needle, *sentences[depth:]]) + end

    def sentence() -> str:
        who, where = rng.choice([other for other in _NAMES if other != name]), rng.choice(_PLACES)
        return f"{who} {rng.choice(_VERBS)} the {rng.choice(_ADJECTIVES)} {where}."

    return _question(_filled(text, sentence, length, answerer), value, answerer)


def _key_value(rng: random.Random, length: int, number: int, count: int, answerer: Answerer) -> Question:
    keys: dict[str, str] = {}

    def pair() -> str:
        key = _digits(rng)
        while key in keys:
            key = _digits(rng)
        keys[key] = _digits(rng)
        return f"{key}: {keys[key]}"

    def text(pairs: list[str]) -> str:
        wanted = pairs[round((len(pairs) - 1) * number / max(1, count - 1))] if pairs else "0: 0"
        return "\n".join([*pairs, wanted.partition(" ")[0]])

    prompt = _filled(text, pair, length, answerer)
    return _question(prompt, keys[prompt.splitlines()[-1].rstrip(":")], answerer)


def _filled(text: Callable[[list[str]], str], part: Callable[[], str], length: int, answerer: Answerer) -> str:
    """The text of as many parts as fit, found by halves: a tokenizer may join what stands side by side."""
    parts = [part()]
    if len(answerer.encode(text(parts))) > length:
        raise ValueError(f"--lengths={length}: is too short for a question; the shortest needs more tokens")
    while len(answerer.encode(text(parts))) <= length:
        parts += [part() for _ in range(len(parts))]
    low, high = 1, len(parts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(answerer.encode(text(parts[:middle]))) <= length else (low, middle)
    return text(parts[:low])


def _question(prompt: str, value: str, answerer: Answerer) -> Question:
    return Question(
        prompt, lambda answer: [word.rstrip(".") for word in answer.split()[:1]] == [value],
        len(answerer.encode(f" {value}.")) + 2, ("\n",),
    )  # fmt: skip


def _digits(rng: random.Random) -> str:
    return "".join(str(rng.randrange(10)) for _ in range(_DIGITS))
