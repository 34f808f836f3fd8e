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
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from common.text import shown

logger = logging.getLogger(__name__)

CACHE = os.path.join("~", ".cache", "dist-clm-train")
READ_BYTES = 1 << 23
MAPPED = 64  # indices that are mapped at once, for each takes a file descriptor
LOOKUPS = 4096  # after so many, the pages that they brought into memory are let go
# Magic; size and time of change of the file; number of lines; digest of the ends.
_HEADER = struct.Struct("<8sQQQ16s")
_MAGIC = b"lines 2\n"
_NEWLINE = ord("\n")


class LineIndex:
    """Where the lines of a file end; `digest` is of all ends.

    kept: where they are kept, or, where they are not, the ends themselves.
    """

    def __init__(self, kept: Path | NDArray[np.uint64], num_lines: int, digest: bytes) -> None:
        self._kept, self._num_lines, self.digest = kept, num_lines, digest

    def __len__(self) -> int:
        return self._num_lines

    @property
    def ends(self) -> NDArray[np.uint64]:
        """`ends[i]` is the byte after line i, uint64 (lines,).

        Raises:
            ValueError: The file that they are kept in has gone, or is another.
        """
        if isinstance(self._kept, Path):
            return _mapped(self._kept, self.digest).ends()
        return self._kept

    def span(self, line: int) -> tuple[int, int]:
        """The first byte of a line, counted from 0, and the one after it; raises as `ends`."""
        ends = self.ends
        return (int(ends[line - 1]) if line else 0), int(ends[line])


class _Mapped:
    """Ends that lie in a file."""

    def __init__(self, file: mmap.mmap) -> None:
        self._file, self._lookups = file, 0
        self._ends = np.frombuffer(file, np.uint64, offset=_HEADER.size)

    def ends(self) -> NDArray[np.uint64]:
        """See `LineIndex.ends`; not to be held, so that pages may go."""
        self._lookups += 1
        if self._lookups % LOOKUPS == 0:
            self._file.madvise(mmap.MADV_DONTNEED)
        return self._ends


@lru_cache(maxsize=MAPPED)
def _mapped(kept: Path, digest: bytes) -> _Mapped:
    try:
        with kept.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # the latter: it is empty
        raise ValueError(f"{shown(str(kept))}: cannot be read any more: {error}") from error
    if not mapped[: _HEADER.size].endswith(digest):
        raise ValueError(f"{shown(str(kept))}: another process made it anew, of another file")
    return _Mapped(mapped)


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
            magic, size, changed, lines, digest = _HEADER.unpack(file.read(_HEADER.size))
        whole = kept.stat().st_size == _HEADER.size + 8 * lines
    except (OSError, struct.error):
        return None
    if not whole or (magic, size, changed) != (_MAGIC, stat.st_size, stat.st_mtime_ns):
        return None
    return LineIndex(kept, lines, digest)


def _make(path: str, places: Sequence[Path], stat: os.stat_result) -> LineIndex:
    with open(path, "rb", buffering=0) as file:
        opened = _open_new(path, places)
        if opened is None:
            ends = np.concatenate(list(_line_ends(file, path, stat)))
            digest = hashlib.blake2b(ends.tobytes(), digest_size=16)
            return LineIndex(ends, len(ends), digest.digest())
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
    return LineIndex(kept, lines, digest.digest())


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
            logger.info(
                "%s: the index of its lines is %s (beside it: %s)", shown(path), kept, refused
            )
        return kept, written
    logger.warning(
        "%s: the index of its lines cannot be kept (%s): each run makes it anew",
        shown(path),
        refused,
    )
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
