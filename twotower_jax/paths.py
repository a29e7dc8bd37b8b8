"""Paths as people write them, in flags, in a config and in files that list others: what every command understands."""

import os
import urllib.parse

_SCHEME = "file://"


def local_path(text: str) -> str:
    """A path of this machine: `~` and `~user` stand for a home folder, and a leading `file://` is taken off.

    Anything else stays as it is, "" and the Hub's ids too. A file whose name really begins with ~ is `./~…`.

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
