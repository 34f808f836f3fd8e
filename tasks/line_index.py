"""Where each line of a file ends, found once and kept beside the file.

The index of `a.jsonl` is `.a.jsonl.lines`: what it was made from (size and time of change), a
digest of the ends, then the ends as 64-bit numbers, which are mapped, not read. It is made anew
when the file has changed. Where it cannot be written, it is in CACHE under a name that the file's
path says; where neither can be, it is held in memory, and made again by the next run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tasks.registry import shown

logger = logging.getLogger(__name__)

CACHE = os.path.join("~", ".cache", "dist-clm-train")
READ_BYTES = 1 << 23
LOOKUPS = 4096  # after so many, the pages that they brought into memory are let go
# Magic; size and time of change of the file; number of lines; digest of the ends.
_HEADER = struct.Struct("<8sQQQ16s")
_MAGIC = b"lines 2\n"
_NEWLINE = ord("\n")


class LineIndex:
    """`ends[i]` is the byte after line i, uint64 (lines,); `digest` is of all of them.

    mapped: what `ends` lies in, where that is a file.
    """

    def __init__(
        self, ends: NDArray[np.uint64], digest: bytes, mapped: mmap.mmap | None = None
    ) -> None:
        self.ends, self.digest = ends, digest
        self._mapped, self._lookups = mapped, 0

    def __len__(self) -> int:
        return len(self.ends)

    def span(self, line: int) -> tuple[int, int]:
        """The first byte of a line, counted from 0, and the one after it."""
        self._lookups += 1
        if self._mapped is not None and self._lookups % LOOKUPS == 0:
            self._mapped.madvise(mmap.MADV_DONTNEED)
        return (int(self.ends[line - 1]) if line else 0), int(self.ends[line])


def line_index(path: str) -> LineIndex:
    """The index of a file's lines: the one that is kept, or a new one.

    Raises:
        ValueError: The file cannot be read, or changes meanwhile.
    """
    try:
        stat = os.stat(path)
        places = _places(path)
        found = (_load(kept, stat) for kept in places)
        index = next((one for one in found if one is not None), None)
        return _make(path, places, stat) if index is None else index
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error


def _places(path: str) -> list[Path]:
    """Where an index may be kept, the better place first."""
    name = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).hexdigest()
    cache = Path(os.path.expanduser(CACHE))
    beside = Path(path).parent / f".{Path(path).name}.lines"
    return [beside, cache / f"{name}.lines"] if cache.is_absolute() else [beside]


def _load(kept: Path, stat: os.stat_result) -> LineIndex | None:
    """The index that is kept, if it is one of the file as it is now, and whole."""
    try:
        with kept.open("rb") as file:
            magic, size, changed, lines, _ = _HEADER.unpack(file.read(_HEADER.size))
        whole = kept.stat().st_size == _HEADER.size + 8 * lines
    except (OSError, struct.error):
        return None
    if not whole or (magic, size, changed) != (_MAGIC, stat.st_size, stat.st_mtime_ns):
        return None
    return _mapped(kept)


def _mapped(kept: Path) -> LineIndex:
    with kept.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    *_, digest = _HEADER.unpack(mapped[: _HEADER.size])
    return LineIndex(np.frombuffer(mapped, np.uint64, offset=_HEADER.size), digest, mapped)


def _make(path: str, places: Sequence[Path], stat: os.stat_result) -> LineIndex:
    with open(path, "rb", buffering=0) as file:
        opened = _open_new(path, places)
        if opened is None:
            ends = np.concatenate(list(_line_ends(file, path, stat)))
            return LineIndex(ends, hashlib.blake2b(ends.tobytes(), digest_size=16).digest())
        kept, written = opened
        with written:
            written.write(bytes(_HEADER.size))
            digest, lines = hashlib.blake2b(digest_size=16), 0
            for part in _line_ends(file, path, stat):
                written.write(part.tobytes())
                digest.update(part.tobytes())
                lines += len(part)
            written.seek(0)
            made_from = stat.st_size, stat.st_mtime_ns
            written.write(_HEADER.pack(_MAGIC, *made_from, lines, digest.digest()))
            written.flush()
            os.chmod(written.name, 0o644)
            os.replace(written.name, kept)
            with contextlib.suppress(FileNotFoundError):  # it has its name now
                written.close()
    return _mapped(kept)


def _open_new(path: str, places: Sequence[Path]) -> tuple[Path, Any] | None:
    """The first place that can be written, and a file that is to stand there; None: no place."""
    refused = ""
    for kept in places:
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            written = tempfile.NamedTemporaryFile(dir=kept.parent, prefix=f"{kept.name}.")  # noqa: SIM115
        except OSError as error:
            refused = refused or str(error.strerror)
            continue
        if refused:
            logger.info("%s: the index of its lines is %s (beside it: %s)",
                        shown(path), kept, refused)  # fmt: skip
        return kept, written
    logger.warning("%s: the index of its lines cannot be kept (%s): each run makes it anew",
                   shown(path), refused)  # fmt: skip
    return None


def _line_ends(file: BinaryIO, path: str, stat: os.stat_result) -> Iterator[NDArray[np.uint64]]:
    """The ends of all lines, part by part; the last line may lack its newline."""
    offset, ends_with_newline = 0, True
    while raw := file.read(READ_BYTES):
        found = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == _NEWLINE)
        yield (found + (offset + 1)).astype(np.uint64)
        offset, ends_with_newline = offset + len(raw), raw[-1] == _NEWLINE
    if not ends_with_newline:
        yield np.array([offset], dtype=np.uint64)
    elif offset == 0:
        yield np.empty(0, dtype=np.uint64)
    if offset != stat.st_size:
        raise ValueError(f"{shown(path)}: the file changes while it is read")
