"""Text for messages and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def shown(value: str) -> str:
    """Returns `value` escaped where it is not printable, so that a message stays one line."""
    return value if value.isprintable() else ascii(value)


def one_line(error: BaseException) -> str:
    """Returns the text of an error as a single line."""
    return " ".join(str(error).split()) or type(error).__name__


def format_bytes(count: int) -> str:
    """Returns `1.23 GB`, or `1.23 MB` below a tenth of a GB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def in_units(num_bytes: int) -> str:
    """Returns `812.3 MB`, in powers of 1000."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"


def format_table(rows: Iterable[Sequence[str]], *, align_right: bool = False) -> str:
    """Returns the rows as lines with columns of equal widths."""
    lines = list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = str.rjust if align_right else str.ljust
    return "\n".join("  ".join(map(justify, line, widths)).rstrip() for line in lines)
