"""Names of files and what they hold, in messages of one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def shown(value: str) -> str:
    """`value` as it may stand in a message of one line."""
    return value if value.isprintable() else ascii(value)


def format_bytes(count: int) -> str:
    """`1.23 GB`, or `1.23 MB` below a tenth of that unit."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def one_line(error: BaseException) -> str:
    """The text of an error as the single line that a user sees."""
    return " ".join(str(error).split()) or type(error).__name__


def in_units(num_bytes: int) -> str:
    """`812.3 MB`, in powers of 1000."""
    for size, unit in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} kB"


def _table(rows: Iterator[Sequence[str]]) -> str:
    lines = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + "\n"
        for line in lines
    )
