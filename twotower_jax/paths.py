"""Paths as people write them, in flags, in a config and in files that list others: what every command understands.

A path of this machine is a `pathlib.Path`; one that begins with gs://, s3:// or hf:// is an object store's, and has the
same interface.
"""

import os
import pathlib
import urllib.parse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twotower_jax.stores.path import StorePath

# One of this machine or of a store.
type AnyPath = "pathlib.Path | StorePath"

_SCHEME = "file://"
STORES = ("gs://", "s3://", "hf://")


def as_path(path: str | os.PathLike | AnyPath) -> AnyPath:
    """A path to work with, from text as `local_path` gives it: of this machine, or of a store (stores/path.py).

    Raises:
      ValueError: if it begins like an address of a store and is none.
    """
    if is_address(path):
        from twotower_jax.stores.path import StorePath

        return StorePath(path)
    return pathlib.Path(path) if isinstance(path, str | os.PathLike) else path


def is_address(path: object) -> bool:
    """Whether a text is an address of a store."""
    return isinstance(path, str) and path.startswith(STORES)


def in_store(path: object) -> bool:
    """Whether a path, as `as_path` gives it, is one of a store."""
    return not isinstance(path, str | os.PathLike)


def local_path(text: str) -> str:
    """A path of this machine: `~` and `~user` stand for a home folder, and a leading `file://` is taken off.

    Anything else stays as it is, "", the Hub's ids and addresses of stores too. A file whose name really begins with ~
    is `./~…`.

    Raises:
      ValueError: for the home of a user that does not exist, or a file:// address of another machine.
    """
    if text.startswith(_SCHEME):
        host, slash, rest = text.removeprefix(_SCHEME).partition("/")
        if host in ("", "localhost"):
            text = slash + urllib.parse.unquote(rest)
        elif host[0] in "~.":
            text = urllib.parse.unquote(host + slash + rest)
        else:
            raise ValueError(f"{text}: is on another machine, {host}; a path of this one begins with file:///")
    if text.startswith("~"):
        home = os.path.expanduser(text)
        if home == text:
            raise ValueError(f"{text}: there is no such home folder; write ./{text} for a file of that name")
        return home
    return text
