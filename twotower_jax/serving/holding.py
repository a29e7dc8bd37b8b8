"""What a body says of the positions of its answer: tokens that stand there, that may, or what the whole has to be."""

import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from twotower_jax.generation.automaton import Automaton
from twotower_jax.serving import json_schema
from twotower_jax.serving.fields import Fields, refused, shown
from twotower_jax.serving.grammars import Grammars

# Fields of which an automaton is made, which may take seconds.
CONSTRAINTS = ("guided_choice", "guided_regex", "guided_json", "structured_outputs", "response_format")
_MOST_CHOICES = 1024

CheckIds = Callable[[list, str], None]


class Constraint(NamedTuple):
    """What an answer has to be.

    Attributes:
      name: of the field that says it. needed: new tokens that have to be possible. wanted: that a request gets which
        does not say how many.
    """

    name: str
    automaton: Automaton
    needed: int
    wanted: int


def read_constraint(fields: Fields, grammars: Grammars) -> Constraint | None:
    """The fields `CONSTRAINTS`, of which one may say something.

    Raises:
      ApiError: naming the field.
    """
    given = {name: value for name in CONSTRAINTS if (value := fields.take(name, None)) is not None}
    found = [(name, name.removeprefix("guided_"), value) for name, value in given.items() if "guided" in name]
    if "structured_outputs" in given:
        found.append(_structured(given["structured_outputs"]))
    if "response_format" in given and (schema := _response_format(given["response_format"])) is not None:
        found.append(("response_format", "json", schema))
    if len(found) > 1:
        raise refused(found[1][0], f"says what the answer has to be, and so does {found[0][0]}: give one of the two")
    for name, kind, value in found:
        try:
            return _made(name, kind, value, grammars)
        except (ValueError, ModuleNotFoundError) as error:
            raise refused(name, str(error)) from None
    return None


def _structured(given: Any) -> tuple[str, str, Any]:
    if not isinstance(given, dict) or len(given) != 1 or not given.keys() <= {"choice", "regex", "json"}:
        raise refused("structured_outputs", 'must be an object with one of "choice", "regex" and "json"')
    ((kind, value),) = given.items()
    return "structured_outputs", kind, value


def _response_format(given: Any) -> Any:
    """Its schema; None for plain text."""
    if not isinstance(given, dict) or not isinstance(given.get("type"), str):
        raise refused("response_format", 'must be an object with a "type"')
    kind, about = given["type"], given.get("json_schema")
    if kind == "text" and given == {"type": "text"}:
        return None
    if kind == "json_object":
        raise refused("response_format", "JSON of any kind cannot be honored: give a schema, with type 'json_schema'")
    if kind != "json_schema" or given.keys() != {"type", "json_schema"} or not isinstance(about, dict):
        raise refused(
            "response_format", f"type 'text' or 'json_schema' with a schema can be honored, not {shown(kind)}"
        )
    if not about.keys() <= {"name", "description", "schema", "strict"} or "schema" not in about:
        raise refused(
            "response_format", '"json_schema" must hold "schema", and at most "name", "description", "strict"'
        )
    return about["schema"]


def _made(name: str, kind: str, value: Any, grammars: Grammars) -> Constraint:
    if kind == "choice":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError("must be a list of texts")
        if not 0 < len(value) <= _MOST_CHOICES:
            raise ValueError(f"must hold 1 to {_MOST_CHOICES} texts")
        automaton, longest = grammars.choices(value)
        return Constraint(name, automaton, longest, longest + 1)
    if kind == "regex":
        if not isinstance(value, str):
            raise ValueError("must be a text")
        automaton = grammars.regex(value)
    else:
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not valid JSON ({error})") from None
        json_schema.check(value)
        automaton = grammars.schema(value)
    if automaton.shortest == float("inf"):
        raise ValueError("no text of this tokenizer's tokens is one of those that it allows")
    return Constraint(name, automaton, int(automaton.shortest), int(automaton.shortest) + 1)


def read_pinned(fields: Fields, tokens: int, check_ids: CheckIds) -> dict[int, int]:
    """Position → token, of `tokens` new ones."""
    given = _by_position(fields, "pinned", tokens, 'must be an object of positions and token ids, such as {"3": 17}')
    for position, token in given.items():
        check_ids([token], f"pinned[{position}]")
    return given


def read_allowed(fields: Fields, tokens: int, check_ids: CheckIds) -> dict[int, list[int]]:
    """Position → tokens, one of which is to stand there."""
    what = 'must be an object of positions and lists of token ids, such as {"3": [17, 18]}'
    given = _by_position(fields, "allowed", tokens, what)
    for position, ids in given.items():
        if not isinstance(ids, list) or not ids:
            raise refused("allowed", what)
        check_ids(ids, f"allowed[{position}]")
    return given


def read_start(fields: Fields, tokens: int, mask_token_id: int, check_ids: CheckIds) -> list[int] | None:
    """What the first positions begin with; null, or the mask token, where they are undecided."""
    given = fields.take("start", None)
    if given is None:
        return None
    if not isinstance(given, list) or not 0 < len(given) <= tokens:
        raise refused("start", f"must be a list of 1 to {tokens} token ids, or null where a position is undecided")
    ids = [mask_token_id if token is None else token for token in given]
    check_ids(ids, "start")
    return ids


def _by_position(fields: Fields, name: str, tokens: int, what: str) -> dict[int, Any]:
    given = fields.take(name, {})
    if not isinstance(given, dict):
        raise refused(name, what)
    for position in given:
        if not re.fullmatch(r"0|[1-9][0-9]{0,8}", position) or int(position) >= tokens:
            raise refused(name, f"there is no position {shown(position)} in {tokens} new tokens")
    return {int(position): value for position, value in given.items()}
