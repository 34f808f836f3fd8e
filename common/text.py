"""Functions that format text for messages: errors as one line, sizes in bytes, and tables."""

from collections.abc import Callable, Iterable, Sequence

CLEAR_LINE = "\r\x1b[2K"  # on a terminal: deletes the current line


def shown(value: str) -> str:
    """Returns `value`, escaped if it has characters that are not printable."""
    return value if value.isprintable() else ascii(value)


def one_line(error: BaseException) -> str:
    """Returns the text of an error as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def format_bytes(num_bytes: int) -> str:
    """Formats a number of bytes as `812.3 MB` (1 MB is 1000 kB), or `812 bytes` if below 1000."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"


def format_table(
    rows: Iterable[Sequence[str]], *, justify: Callable[[str, int], str] = str.ljust
) -> str:
    """Formats rows as lines with aligned columns; `justify` is str.ljust or str.rjust."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(justify, row, widths)).rstrip() for row in cells)
