"""Which cases run without `--whole`: of each property some, of each matrix of cases a slice."""

import collections
import pathlib

import pytest

MARKER = "whole(but=()): further cases of a property, for --whole; those with one of the strings in their name stay"


def further_cases(config: pytest.Config, items: list[pytest.Item]) -> set[pytest.Item]:
    """Those that are marked `whole`, but for what is named on the command line, as FILE::TEST."""
    arguments = (argument.partition("::") for argument in config.args)
    named = [((config.invocation_params.dir / file).resolve(), test) for file, _, test in arguments if test]
    if not named:
        _check_kept(items)
    return {item for item in items if _is_further(item) and not any(_is_of(item, *one) for one in named)}


def _kept(item: pytest.Item) -> list[str]:
    return [text for mark in item.iter_markers("whole") for text in mark.kwargs.get("but", ())]


def _is_further(item: pytest.Item) -> bool:
    return item.get_closest_marker("whole") is not None and not any(text in item.name for text in _kept(item))


def _check_kept(items: list[pytest.Item]) -> None:
    """A slice that lost its cases, because a parameter is named otherwise by now, would go unnoticed."""
    names = collections.defaultdict(str)
    for item in items:
        names[item.function] += item.name
    lost = [(item.nodeid, text) for item in items for text in _kept(item) if text not in names[item.function]]
    if lost:
        raise pytest.UsageError("no case of {} has {!r} in its name".format(*lost[0]))


def _is_of(item: pytest.Item, file: pathlib.Path, test: str) -> bool:
    name = item.nodeid.partition("::")[2]
    return item.path == file and (name == test or name.startswith((f"{test}[", f"{test}::")))
