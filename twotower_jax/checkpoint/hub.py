"""Where a source comes from: a folder, or the Hugging Face Hub; and the hashes that the Hub's client has recorded."""

import pathlib
import re
from typing import NamedTuple

from twotower_jax.checkpoint.config_file import SMALL_FILES
from twotower_jax.checkpoint.huggingface import INDEX
from twotower_jax.files import CheckpointError, check_folder, read_bytes
from twotower_jax.paths import as_path, in_store

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SMALL = 16 << 20


class Source(NamedTuple):
    """A local folder (or file), what to call it, and the Hub's commit where known."""

    path: pathlib.Path
    name: str
    revision: str | None


def resolve(source: str, revision: str | None = None) -> Source:
    """A local path as it is; a Hub id downloaded, without code and pickles.

    Raises:
      ValueError: if it is neither, or the Hub does not give it.
    """
    path = as_path(source)
    if in_store(path):
        if revision is not None:
            raise ValueError(f"--revision={revision} goes with a Hub id; write hf://ORGANIZATION/NAME@REVISION")
        check_folder(path, "give a Hugging Face folder")
        return Source(path, str(path), None)
    if path.exists():
        if revision is not None:
            raise ValueError(f"--revision={revision} goes with a Hub id; {source} is on this machine")
        return _local(path)
    if not _REPOSITORY.fullmatch(source):
        raise ValueError(f"{source}: no such folder")
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            source, revision=revision, allow_patterns=[*SMALL_FILES, INDEX, "*.safetensors"]
        )
    except Exception as error:  # Whatever the network may raise.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{source}: no such folder, and the Hub does not give it ({reason[0]})") from error
    return Source(pathlib.Path(found), source, pathlib.Path(found).name)


def _local(path: pathlib.Path) -> Source:
    folder = path.resolve()
    # A snapshot in the Hub's cache: models--ORGANIZATION--NAME/snapshots/COMMIT.
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return Source(path, repository.removeprefix("models--").replace("--", "/"), folder.name)
    return Source(path, folder.name, None)


def recorded_hashes(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 by file name, as far as the Hub's client has left them beside its downloads.

    In its cache a large file is a link to a blob of that name; in a plain folder, notes lie in `.cache/huggingface`.
    """
    hashes = {}
    if in_store(folder):
        return hashes
    for file in folder.glob("*.safetensors"):
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        found = None
        if file.is_symlink():
            found = file.readlink().name
        elif note.is_file():
            lines = read_bytes(note, _SMALL).decode(errors="replace").splitlines()  # commit, etag, time
            found = lines[1] if len(lines) > 1 else None
        if found is not None and _SHA256.fullmatch(found):
            hashes[file.name] = found
    return hashes


def read_hashes(path: pathlib.Path) -> dict[str, str]:
    """A list as `sha256sum` prints it.

    Raises:
      ValueError: if it is not one.
    """
    hashes = {}
    try:
        text = read_bytes(path, _SMALL).decode()
    except (CheckpointError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from None
    for line in text.splitlines():
        digest, _, name = line.partition(" ")
        name = name.lstrip(" *")
        if not _SHA256.fullmatch(digest) or not name:
            raise ValueError(f"{path}: {line[:80]!r} is no line of SHA-256 and file name")
        hashes[pathlib.PurePath(name).name] = digest
    return hashes
