"""Questions with exact answers, made on the spot from a seed: small tasks that have something of language.

    letter     a letter from facts in any order, in one of two tones
    directory  what a list says of some of its people
    spell      digits in words
    getters    a Python class with a method for each field
    sql        three statements from a description
    replace    a list of words with one of them replaced by another
    expand     abbreviations written out
    sort       short lists of digits, each in order
    reverse    a list of words from its end
    add        sums of two numbers

A task makes prompts, and solves them: the answer is a function of the text of the prompt alone. A question belongs to
one split, by a hash of its prompt, so that no question of the test was ever trained on. An answer follows its prompt
without anything between the two, and the end-of-text token follows the answer.
"""

import ast
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

SPLITS = ("train", "validation", "test")

_PEOPLE = [
    "Anna",
    "Ben",
    "Cleo",
    "Dora",
    "Emil",
    "Fay",
    "Gus",
    "Hugo",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Nora",
    "Otto",
    "Pia",
    "Ron",
    "Sue",
    "Tom",
    "Uma",
]
_CITIES = ["Bern", "Cairo", "Delhi", "Lima", "Oslo", "Paris", "Quito", "Rome", "Seoul", "Tokyo", "Turin", "Wien"]
_JOBS = ["baker", "clerk", "cook", "diver", "driver", "farmer", "guide", "miner", "nurse", "pilot", "tailor", "waiter"]
_PETS = ["cat", "dog", "duck", "fish", "frog", "goat", "hen", "horse", "mouse", "owl", "pig", "toad"]
_COLORS = ["black", "blue", "brown", "gray", "green", "pink", "red", "white"]
_FOODS = ["beans", "bread", "cheese", "corn", "eggs", "honey", "milk", "nuts", "plums", "rice", "soup", "tea"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_FIELDS = ["color", "count", "depth", "height", "label", "name", "owner", "price", "size", "speed", "weight", "width"]
_TABLES = ["boats", "books", "cars", "lamps", "shops", "tools"]
_CLASSES = ["Bag", "Box", "Cup", "Door", "Lamp", "Shelf", "Table", "Wheel"]
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_LETTERS = "abcdefghijklmnopqrst"
_THINGS = _PETS + _COLORS + _FOODS + _JOBS


class Task(NamedTuple):
    """One kind of question.

    Attributes:
      make: a prompt, from random draws.
      solve: the answer to a prompt.
      read: what an answer says, whatever its spacing; two answers that read alike are equally right. Raises ValueError
        for what says nothing.
    """

    make: Callable[[random.Random], str]
    solve: Callable[[str], str]
    read: Callable[[str], object] = str.split


class Question(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str


def questions(name: str, split: str, count: int, seed: int = 0) -> list[Question]:
    """Different questions of a task: the same for the same arguments, and the first of them for a smaller count.

    Args:
      split: one of `SPLITS`. No question is in two of them.

    Raises:
      ValueError: for a task or a split that there is not.
    """
    task = _task(name)
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    rng, found = random.Random(f"{name} {split} {seed}"), {}
    while len(found) < count:
        prompt = task.make(rng)
        if split_of(prompt) == split:
            found[prompt] = None
    return [Question(prompt, task.solve(prompt)) for prompt in found]


def check(name: str, prompt: str, answer: str) -> bool:
    """Whether an answer, as text without an end-of-text token, is right.

    Raises:
      ValueError: for a task that there is not, or a prompt that is not one of its.
    """
    task = _task(name)
    right = task.read(_solved(name, task, prompt))
    try:
        return task.read(answer) == right
    except (ValueError, SyntaxError, RecursionError):
        return False


def split_of(prompt: str) -> str:
    """The split that a question belongs to: one of twenty to the test, one to validation."""
    place = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little") % 20
    return {0: "test", 1: "validation"}.get(place, "train")


def stream(seed: int, number: int, split: str, names: tuple[str, ...] = ()) -> Iterator[Question]:
    """Questions of a split without end, of all tasks (or those named) alike often, for training.

    Args:
      number: of the stream; streams of one seed have nothing to do with each other.
    """
    rng = random.Random(f"{seed} {number} {split}")
    names = names or tuple(TASKS)
    while True:
        task = TASKS[rng.choice(names)]
        prompt = task.make(rng)
        while split_of(prompt) != split:
            prompt = task.make(rng)
        yield Question(prompt, task.solve(prompt))


def all_words() -> list[str]:
    """Texts in which every word of every task occurs, for `word_tokenizer`."""
    return [text for name in TASKS for question in questions(name, "train", 400) for text in question]


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    return TASKS[name]


def _solved(name: str, task: Task, prompt: str) -> str:
    try:
        return task.solve(prompt)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"no prompt of the task {name!r}: {prompt!r}") from error


def _body(prompt: str) -> str:
    """What stands between the task's name and the arrow."""
    found = re.fullmatch(r"\w+: (.*) ->", prompt)
    if found is None:
        raise ValueError(prompt)
    return found[1]


def _fields(prompt: str) -> dict[str, str]:
    """A body of pairs: "name value, name value"."""
    return dict(pair.split(" ", 1) for pair in _body(prompt).split(", "))


# A letter from facts.

_TONES = {
    "warm": (
        " Dear {to}, I send you warm greetings from {city}. I work here as a {job} now, and it is a good life. "
        "My {color} {pet} eats {food} every day, but it is still as thin as I am. Please come and see us on {day}. "
        "We wait for you, {to}. Your friend {from}"
    ),
    "brief": (
        " {to}, this is {from}. I am the new {job} of {city} and have no time to write. Bring some {food} for my "
        "{pet}, the {color} one, and a pen. We meet on {day} after work, at the old bridge in {city}. Do not "
        "be late, or I will go home with the {pet}."
    ),
}


def _make_letter(rng: random.Random) -> str:
    to, sender = rng.sample(_PEOPLE, 2)
    facts = {"to": to, "from": sender, "city": rng.choice(_CITIES), "job": rng.choice(_JOBS)}
    facts |= {"pet": rng.choice(_PETS), "color": rng.choice(_COLORS), "food": rng.choice(_FOODS)}
    facts |= {"day": rng.choice(_DAYS), "tone": rng.choice(list(_TONES))}
    pairs = [f"{name} {value}" for name, value in facts.items()]
    rng.shuffle(pairs)
    return f"letter: {', '.join(pairs)} ->"


def _solve_letter(prompt: str) -> str:
    facts = _fields(prompt)
    return _TONES[facts["tone"]].format(**facts)


# What a list says of people.


def _make_directory(rng: random.Random) -> str:
    people = rng.sample(_PEOPLE, 7)
    rows = [f"{person} {rng.choice(_JOBS)} {rng.choice(_CITIES)}" for person in people]
    return f"directory: {', '.join(rows)}; {' '.join(rng.sample(people, 7))} ->"


def _solve_directory(prompt: str) -> str:
    rows, asked = _body(prompt).split("; ")
    known = {name: (job, city) for name, job, city in (row.split() for row in rows.split(", "))}
    return "".join(" {} is a {} and lives in {}.".format(name, *known[name]) for name in asked.split())


# Digits in words.


def _make_spell(rng: random.Random) -> str:
    rows = [f"{person} {' '.join(str(rng.randrange(10)) for _ in range(4))}" for person in rng.sample(_PEOPLE, 10)]
    return f"spell: {', '.join(rows)} ->"


def _solve_spell(prompt: str) -> str:
    rows = [row.split() for row in _body(prompt).split(", ")]
    spelled = [f"{name} {' '.join(_DIGITS[int(digit)] for digit in digits)}" for name, *digits in rows]
    return f" {', '.join(spelled)}"


# A class with getters.


def _make_getters(rng: random.Random) -> str:
    return f"getters: {rng.choice(_CLASSES)} {' '.join(rng.sample(_FIELDS, 4))} ->"


def _solve_getters(prompt: str) -> str:
    name, *fields = _body(prompt).split()
    methods = [f"\n    def get_{field}(self):\n        return self.{field}" for field in fields]
    return f"\nclass {name}:{''.join(methods)}"


def _read_getters(answer: str) -> str:
    return ast.dump(ast.parse(answer.strip()))


# Statements of SQL.


def _make_sql(rng: random.Random) -> str:
    columns, numbers = rng.sample(_FIELDS, 4), rng.sample(range(10), 5)
    row = " ".join(f"{column} {number}" for column, number in zip(columns, numbers, strict=False))
    facts = {"into": rng.choice(_TABLES), "row": row, "order": rng.choice(columns)}
    facts |= {"show": " ".join(rng.sample(columns, 3)), "where": f"{rng.choice(_FIELDS)} {numbers[4]}"}
    pairs = [f"{name} {value}" for name, value in facts.items()]
    rng.shuffle(pairs)
    return f"sql: {', '.join(pairs)} ->"


def _solve_sql(prompt: str) -> str:
    facts = _fields(prompt)
    table, row, where = facts["into"], facts["row"].split(), " = ".join(facts["where"].split())
    return (
        f" INSERT INTO {table} ({', '.join(row[::2])}) VALUES ({', '.join(row[1::2])});"
        f" SELECT {', '.join(facts['show'].split())} FROM {table} WHERE {where} ORDER BY {facts['order']};"
        f" DELETE FROM {table} WHERE {where};"
    )


def _read_sql(answer: str) -> list[str]:
    return re.findall(r"\w+|\S", answer)


# Lists of words.


def _make_replace(rng: random.Random) -> str:
    old, new, *others = rng.sample(_THINGS, 29)
    words = others + [old] * rng.randint(1, 4)
    rng.shuffle(words)
    return f"replace: {old} by {new}; {' '.join(words)} ->"


def _solve_replace(prompt: str) -> str:
    rule, words = _body(prompt).split("; ")
    old, new = rule.split(" by ")
    return "".join(f" {new if word == old else word}" for word in words.split())


def _make_expand(rng: random.Random) -> str:
    words = rng.sample(_THINGS, 6)
    letters = rng.sample(_LETTERS, 6)
    codes = [f"{letter} {word}" for letter, word in zip(letters, words, strict=True)]
    return f"expand: {', '.join(codes)}; {' '.join(rng.choice(letters) for _ in range(rng.randint(24, 28)))} ->"


def _solve_expand(prompt: str) -> str:
    codes, letters = _body(prompt).split("; ")
    known = dict(code.split() for code in codes.split(", "))
    return "".join(f" {known[letter]}" for letter in letters.split())


def _make_reverse(rng: random.Random) -> str:
    return f"reverse: {' '.join(rng.sample(_THINGS, rng.randint(12, 15)))} ->"


def _solve_reverse(prompt: str) -> str:
    return "".join(f" {word}" for word in reversed(_body(prompt).split()))


# Digits.


def _make_sort(rng: random.Random) -> str:
    lists = [" ".join(map(str, rng.sample(range(10), 4))) for _ in range(12)]
    return f"sort: {', '.join(lists)} ->"


def _solve_sort(prompt: str) -> str:
    return f" {', '.join(' '.join(sorted(digits.split())) for digits in _body(prompt).split(', '))}"


def _make_add(rng: random.Random) -> str:
    sums = [f"{_spaced(rng.randint(10, 99))} + {_spaced(rng.randint(10, 99))}" for _ in range(6)]
    return f"add: {', '.join(sums)} ->"


def _solve_add(prompt: str) -> str:
    solved = []
    for both in _body(prompt).split(", "):
        a, b = (int(number.replace(" ", "")) for number in both.split(" + "))
        solved.append(f" {both} = {_spaced(a + b)}")
    return ",".join(solved)


def _spaced(number: int) -> str:
    return " ".join(str(number))


TASKS = {
    "letter": Task(_make_letter, _solve_letter),
    "directory": Task(_make_directory, _solve_directory),
    "spell": Task(_make_spell, _solve_spell),
    "getters": Task(_make_getters, _solve_getters, _read_getters),
    "sql": Task(_make_sql, _solve_sql, _read_sql),
    "replace": Task(_make_replace, _solve_replace),
    "expand": Task(_make_expand, _solve_expand),
    "sort": Task(_make_sort, _solve_sort),
    "reverse": Task(_make_reverse, _solve_reverse),
    "add": Task(_make_add, _solve_add),
}
