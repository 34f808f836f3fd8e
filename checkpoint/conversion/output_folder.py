"""An output folder that gets its final name only when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import flush
from common.text import format_bytes


@contextmanager
def new_folder(final: Path, *, needed: int) -> Iterator[Path]:
    """Yields a temporary folder beside `final`; renames it to `final` at the end.

    If the code in the `with` block fails, the temporary folder is deleted.

    Raises:
        ValueError: `final` exists and is not an empty folder, or fewer than `needed` bytes are free
            on the disk. No folder is created.
    """
    final = Path(os.path.abspath(final))
    is_empty = final.is_dir() and not any(final.iterdir())
    if not is_empty and (final.exists() or final.is_symlink()):
        raise ValueError(f"{final}: exists already; choose a new name or an empty folder")
    free = shutil.disk_usage(next(parent for parent in final.parents if parent.exists())).free
    if free < needed:
        raise ValueError(
            f"{final}: needs {format_bytes(needed)} of disk space, but only {format_bytes(free)} "
            "is free"
        )
    partial = final.with_name(f"{final.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.iterdir():
            flush(file)
        partial.rename(final)
        flush(final.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
