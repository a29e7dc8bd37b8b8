"""What may not stand for text: Python's strings can hold what no text file can."""


def check_text(text: str, what: str) -> str:
    """`text` itself.

    Raises:
      ValueError: naming `what`, for half of a surrogate pair, which JSON can spell (a "\\ud800" alone) and Python makes
        of the bytes of a command line that are not UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"byte 0x{code - 0xDC00:02x}, not UTF-8" if 0xDC80 <= code <= 0xDCFF else f"half a pair, U+{code:04X}"
        raise ValueError(f"{what}: is no text at character {error.start + 1} ({found})") from None
    return text
