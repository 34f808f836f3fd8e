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

    The files of a failed block are deleted.

    Args:
        needed: the bytes that will be written.

    Raises:
        ValueError: `final` exists and is not an empty folder, or the disk has less than `needed`
            free. Nothing was created then.
    """
    final = Path(os.path.abspath(final))
    _check_absent(final)
    _check_space(final, needed)
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


def _check_absent(final: Path) -> None:
    if final.is_dir() and not any(final.iterdir()):
        return
    if final.exists() or final.is_symlink():
        raise ValueError(f"{final}: exists already, expected a name that is free")


def _check_space(final: Path, needed: int) -> None:
    existing = next(parent for parent in final.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{final}: needs {format_bytes(needed)} of disk, {format_bytes(free)} is free there"
        )
