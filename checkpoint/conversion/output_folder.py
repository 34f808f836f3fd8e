"""An output folder that appears under its name only when it is complete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.files import flush
from common.text import format_bytes


@contextmanager
def new_folder(final: Path, *, needed: int) -> Iterator[Path]:
    """Yields a temporary folder beside `final`, and renames it to that when the block succeeds.

    The files of a failed block are deleted. Raises ValueError, and creates nothing, if `final`
    exists and is not an empty folder, or if the disk has less than `needed` bytes free.
    """
    final = Path(os.path.abspath(final))
    is_empty = final.is_dir() and not any(final.iterdir())
    if not is_empty and (final.exists() or final.is_symlink()):
        raise ValueError(f"{final}: exists already, expected a name that is free")
    free = shutil.disk_usage(next(parent for parent in final.parents if parent.exists())).free
    if free < needed:
        raise ValueError(
            f"{final}: needs {format_bytes(needed)} of disk, {format_bytes(free)} is free there"
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
