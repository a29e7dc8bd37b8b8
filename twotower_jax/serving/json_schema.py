"""Which JSON schemas are honored: those whose texts are a regular language, and that outlines-core understands whole.

It leaves out what it does not know, and then texts would come that the schema does not allow. So everything is named
here that holds, and all else is refused. Of objects the properties come in the order of the schema.
"""

import json
from collections.abc import Mapping
from typing import Any

from twotower_jax.serving.fields import is_integer, shown

# They say nothing of what is valid.
_NOTES = {"title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "deprecated"}
_NOTES |= {"$defs", "definitions"}  # Checked where they are referred to.
# By type the keywords that may stand beside it.
_KEYWORDS = {
    "string": {"minLength", "maxLength"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
    "array": {"items", "minItems", "maxItems", "prefixItems"},
    "object": {"properties", "required", "additionalProperties"},
}
_DEEPEST = 32


def check(schema: Any) -> None:
    """Refuses a schema that would not be kept to in all that it says.

    Raises:
      ValueError: naming the place and the keyword.
    """
    _check(schema, schema, "schema", 0)


def _check(schema: Any, root: Any, where: str, depth: int) -> None:
    if not isinstance(schema, dict):
        raise ValueError(f"{where} must be an object, not {shown(schema)}")
    if depth > _DEEPEST:
        raise ValueError(f"{where} is nested more than {_DEEPEST} times; JSON of any depth cannot be honored")
    said = {name: value for name, value in schema.items() if name not in _NOTES}
    if "$ref" in said:
        _alone(said, "$ref", where)
        _check(_referred(said["$ref"], root, where), root, where, depth + 1)
    elif "anyOf" in said:
        _alone(said, "anyOf", where)
        if not isinstance(said["anyOf"], list) or not said["anyOf"]:
            raise ValueError(f"{where}.anyOf must be a list of schemas")
        for number, one in enumerate(said["anyOf"]):
            _check(one, root, f"{where}.anyOf[{number}]", depth + 1)
    elif "enum" in said or "const" in said:
        _check_values(said, where)
    else:
        _check_type(said, root, where, depth)


def _check_values(said: Mapping[str, Any], where: str) -> None:
    name = "enum" if "enum" in said else "const"
    if left := sorted(said.keys() - {name, "type"}):
        raise ValueError(f"{where}.{left[0]} cannot be honored beside {name}")
    values = said["enum"] if name == "enum" else [said["const"]]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}.enum must be a list of values")
    if bad := [value for value in values if "type" in said and not _is(value, said["type"])]:
        raise ValueError(f"{where}.{name} holds {shown(bad[0])}, which is not of its type, {shown(said['type'])}")


def _check_type(said: Mapping[str, Any], root: Any, where: str, depth: int) -> None:
    kind = said.get("type")
    if isinstance(kind, list) and kind and all(isinstance(one, str) and one in _KEYWORDS for one in kind):
        _alone(said, "type", where)
        if bad := [one for one in kind if one in ("array", "object")]:
            raise ValueError(f"{where}.type: say what {bad[0]} holds, in one schema of anyOf for each type")
        return
    if not isinstance(kind, str) or kind not in _KEYWORDS:
        raise ValueError(f"{where} needs a type, one of {', '.join(_KEYWORDS)}, or anyOf, enum, const or $ref")
    if left := sorted(said.keys() - _KEYWORDS[kind] - {"type"}):
        raise ValueError(f"{where}.{left[0]} cannot be honored in a schema of type {kind}")
    for name in ("minLength", "maxLength", "minItems", "maxItems"):
        if name in said and not (is_integer(said[name]) and said[name] >= 0):
            raise ValueError(f"{where}.{name} must be a whole number, not {shown(said[name])}")
    for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
        if said.get(least, 0) > said.get(most, said.get(least, 0)):
            raise ValueError(f"{where}.{least} is more than {most}")
    if kind == "array":
        _check_array(said, root, where, depth)
    if kind == "object":
        _check_object(said, root, where, depth)


def _check_array(said: Mapping[str, Any], root: Any, where: str, depth: int) -> None:
    if "prefixItems" in said:
        _alone(said, "prefixItems", where, "type")
        if not isinstance(said["prefixItems"], list) or not said["prefixItems"]:
            raise ValueError(f"{where}.prefixItems must be a list of schemas")
        for number, one in enumerate(said["prefixItems"]):
            _check(one, root, f"{where}.prefixItems[{number}]", depth + 1)
        return
    if "items" not in said:
        raise ValueError(f"{where} is an array and needs items: JSON of any depth cannot be honored")
    _check(said["items"], root, f"{where}.items", depth + 1)


def _check_object(said: Mapping[str, Any], root: Any, where: str, depth: int) -> None:
    properties, more = said.get("properties"), said.get("additionalProperties")
    if isinstance(more, dict) and properties is None:
        _alone(said, "additionalProperties", where, "type")
        _check(more, root, f"{where}.additionalProperties", depth + 1)
        return
    if not isinstance(properties, dict):
        raise ValueError(f"{where} is an object and needs properties: JSON of any depth cannot be honored")
    if more is not None and not isinstance(more, bool):
        raise ValueError(f"{where}.additionalProperties cannot be honored beside properties")
    required = said.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError(f"{where}.required must be a list of names")
    if unknown := [name for name in required if name not in properties]:
        raise ValueError(f"{where}.required holds {shown(unknown[0])}, which is not among the properties")
    if bad := [name for name in properties if json.dumps(name, ensure_ascii=False) != f'"{name}"']:
        raise ValueError(f"{where}.properties: the name {shown(bad[0])}, which JSON escapes, cannot be honored")
    for name, one in properties.items():
        _check(one, root, f"{where}.properties.{name[:60]}", depth + 1)


def _alone(said: Mapping[str, Any], name: str, where: str, *beside: str) -> None:
    if left := sorted(said.keys() - {name, *beside}):
        raise ValueError(f"{where}.{left[0]} cannot be honored beside {name}")


def _referred(reference: Any, root: Any, where: str) -> Any:
    """The definition that a reference of this document is to."""
    parts = reference.split("/") if isinstance(reference, str) else []
    if len(parts) == 3 and parts[0] == "#" and parts[1] in ("$defs", "definitions"):
        found = root.get(parts[1])
        if isinstance(found, dict) and parts[2] in found:
            return found[parts[2]]
    raise ValueError(f"{where}.$ref must be '#/$defs/NAME' of a definition that there is, not {shown(reference)}")


def _is(value: Any, kind: Any) -> bool:
    kinds = {
        "string": str,
        "boolean": bool,
        "null": type(None),
        "array": list,
        "object": dict,
    }
    if kind in ("integer", "number"):
        return is_integer(value) or (kind == "number" and isinstance(value, float))
    return isinstance(kind, str) and kind in kinds and isinstance(value, kinds[kind])
