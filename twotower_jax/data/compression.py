"""Reading .gz and .zst as they come, and telling a file that is cut off from one that ends."""

import gzip
import io
import zlib
from typing import BinaryIO

# What a compressed stream raises where its content cannot be had.
CUT_OFF = (EOFError, gzip.BadGzipFile, zlib.error)

# Bytes of input that are decompressed at a time. A few can stand for 128 KiB, so that these never give more than 128
# MiB, whatever a file makes of itself.
_INPUT_BYTES = 1 << 12


def decompressed(raw: BinaryIO, compression: str, where: str) -> BinaryIO:
    """The content of a stream, which raises one of `CUT_OFF` where it cannot be had.

    Args:
      compression: "gzip", "zstd", or "" for none.
      where: the file's name, for messages.

    Raises:
      ValueError: it needs a package that is not installed.
    """
    match compression:
        case "gzip":
            return gzip.open(raw)
        case "zstd":
            return io.BufferedReader(_ZstdReader(raw, zstandard(where)))
    return raw


def zstandard(where: str):
    """The package; ValueError if it is not installed."""
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"{where}: reading .zst needs zstandard, which is not installed: pip install 'twotower_jax[data]'"
        ) from None
    return zstandard


class _ZstdReader(io.RawIOBase):
    """Frames one after the other. The package's own reader takes a file that is cut off for one that ends."""

    def __init__(self, raw: BinaryIO, zstandard):
        self._raw, self._error = raw, zstandard.ZstdError
        # Files made with --long are not refused.
        self._make_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame, self._input, self._output = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("the last frame does not end")
                return 0
            self._frame = self._frame or self._make_frame()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._error as error:
                raise EOFError(error) from None
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count
