"""Reading the files in a .tar one after the other, without writing any of them to the disk."""

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from twotower_jax.data.compression import CUT_OFF

# A name, or a table of extended attributes, that takes more is none that anybody gave.
_LONGEST_HEADER = 1 << 20
_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE)  # fmt: skip


class BrokenArchive(Exception):
    """What cannot be read beyond this place."""


class Member(NamedTuple):
    """A file in an archive.

    Attributes:
      name: as the archive has it, printable.
      hidden: whether it, or a folder that it is in, begins with a dot.
      problem: why it cannot be read, or None.
      content: to be read before the next member is asked for; raises `BrokenArchive`.
    """

    name: str
    hidden: bool
    problem: str | None
    content: BinaryIO | None


def members(stream: BinaryIO) -> Iterator[Member]:
    """The files of an archive in its order; folders are passed over.

    Args:
      stream: the archive, decompressed; need not be one that can be sought in.

    Raises:
      BrokenArchive: it ends before its end, or is none. What came before is as it was.
    """
    try:
        with tarfile.open(
            fileobj=_Whole(stream), mode="r|", tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
        ) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # which would grow with every file
                if member.isdir():
                    continue
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                problem = _problem(member, parts)
                name = ascii(member.name)[1:-1] if not member.name.isprintable() else member.name
                hidden = any(part.startswith(".") and part != ".." for part in parts)
                content = None if problem else io.BufferedReader(_Content(archive.extractfile(member)))
                yield Member(name, hidden, problem, content)
    except tarfile.TarError as error:
        raise BrokenArchive(str(error)) from None


def _problem(member: tarfile.TarInfo, parts: list[str]) -> str | None:
    if member.issym() or member.islnk():
        return f"is a link to {ascii(member.linkname)}; archive what it leads to (tar --dereference)"
    if not member.isreg():
        return "is no regular file"
    if member.issparse():
        return "is a file with holes; archive it as a plain one"
    try:
        member.name.encode("utf-8")
    except UnicodeEncodeError:
        return "has a name that is not UTF-8"
    if member.name.startswith("/"):
        return "has an absolute path; archive files by paths below a folder"
    if ".." in parts:
        return "has a path that leads out of its folder"
    return None


class _Header(tarfile.TarInfo):
    """tarfile takes an archive for one that ends where a header is cut off or broken; this says so."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except (tarfile.HeaderError, ValueError, OverflowError, LookupError, RecursionError) as error:
            raise tarfile.ReadError(str(error)) from None

    @classmethod
    def frombuf(cls, data, encoding, errors):
        header = super().frombuf(data, encoding, errors)
        if header.size < 0 or header.type in _HEADERS and header.size > _LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


class _Whole(io.RawIOBase):
    """A stream whose errors are those of a broken archive."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        try:
            return self._stream.read(size)
        except CUT_OFF as error:
            raise tarfile.ReadError(str(error)) from None


class _Content(io.RawIOBase):
    """A member's content, whose errors are no longer those of its own compression."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            return self._file.readinto(buffer)
        except tarfile.TarError as error:
            raise BrokenArchive(str(error)) from None
