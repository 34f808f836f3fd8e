"""Functions that format text for messages: errors, sizes in bytes, durations and tables."""

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


def format_duration(seconds: float) -> str:
    """Formats a duration in its largest unit: `42 s`, `3:07 min`, `5:02 h` or `2 d 5 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60}:{total % 60:02d} min"
    if total < 86400:
        return f"{total // 3600}:{total % 3600 // 60:02d} h"
    return f"{total // 86400} d {total % 86400 // 3600} h"


def format_seconds(seconds: float) -> str:
    """Formats a time with three digits below a minute (`12.3 ms`, `1.5 s`), else as a duration."""
    if seconds >= 59.95:
        return format_duration(seconds)
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def format_table(
    rows: Iterable[Sequence[str]], *, justify: Callable[[str, int], str] = str.ljust
) -> str:
    """Formats rows as lines with aligned columns; `justify` is str.ljust or str.rjust."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(justify, row, widths)).rstrip() for row in cells)
