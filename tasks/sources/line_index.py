"""An index of a file's line ends, built once and stored in the same folder as the file.

The index of `a.jsonl` is stored as `.a.jsonl.lines`. It holds the file's size and modification
time, a digest of the line ends, and the line ends as 64-bit numbers, which are memory-mapped. The
index is rebuilt when the file has changed. If the file's folder cannot be written, the index is
stored in CACHE_FOLDER, under a hash of the file's path. If CACHE_FOLDER cannot be written either,
the index stays in memory, and every run rebuilds it.
"""

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

CACHE_FOLDER = os.path.join("~", ".cache", "dist-clm-train")
READ_BYTES = 1 << 23
MAX_MAPPED = 64  # limit of indices that are mapped at once; each needs a file descriptor
MAX_LOOKUPS = 4096  # after this many lookups, the pages of the mapping are released
# Magic; size and modification time of the file; number of lines; digest of the line ends.
_HEADER = struct.Struct("<8sQQQ16s")
_MAGIC = b"lines 2\n"
_NEWLINE = ord("\n")


class LineIndex:
    """The line ends of a file; `digest` is a hash of all line ends.

    storage: the path of the stored index, or the line ends if the index could not be stored.
    """

    def __init__(self, storage: Path | NDArray[np.uint64], num_lines: int, digest: bytes) -> None:
        self._storage, self._num_lines, self.digest = storage, num_lines, digest

    def __len__(self) -> int:
        return self._num_lines

    @property
    def ends(self) -> NDArray[np.uint64]:
        """The line ends, uint64 (lines,): `ends[i]` is the position of the byte after line i.

        Raises ValueError if the stored index was deleted or rebuilt.
        """
        if isinstance(self._storage, Path):
            return _map_index(self._storage, self.digest).ends()
        return self._storage

    def span(self, line: int) -> tuple[int, int]:
        """Returns the positions where a line begins and ends; raises ValueError like `ends`."""
        ends = self.ends
        return (int(ends[line - 1]) if line else 0), int(ends[line])


class _MappedIndex:
    """A stored index that is mapped into memory."""

    def __init__(self, file: mmap.mmap) -> None:
        self._file, self._num_lookups = file, 0
        self._ends = np.frombuffer(file, np.uint64, offset=_HEADER.size)

    def ends(self) -> NDArray[np.uint64]:
        """Returns the line ends as in `LineIndex.ends`; callers must not keep the array."""
        self._num_lookups += 1
        if self._num_lookups % MAX_LOOKUPS == 0:
            self._file.madvise(mmap.MADV_DONTNEED)
        return self._ends


@lru_cache(maxsize=MAX_MAPPED)
def _map_index(path: Path, digest: bytes) -> _MappedIndex:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise ValueError(f"{shown(str(path))}: cannot be read any more: {error}") from error
    if not mapped[: _HEADER.size].endswith(digest):
        raise ValueError(f"{shown(str(path))}: another process rebuilt it for a changed file")
    return _MappedIndex(mapped)


def load_line_index(path: str) -> LineIndex:
    """Returns the stored or a new index of a file; raises ValueError if the file is unreadable."""
    try:
        stat = os.stat(path)
        index_paths = _index_paths(path)
        for index_path in index_paths:
            index = _load(index_path, stat)
            if index is not None:
                return index
        return _build(path, index_paths, stat)
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error


def _index_paths(path: str) -> list[Path]:
    """Returns the possible paths of a file's index, the preferred path first."""
    path_hash = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).hexdigest()
    beside = Path(path).parent / f".{Path(path).name}.lines"
    cache = Path(os.path.expanduser(CACHE_FOLDER))
    return [beside, cache / f"{path_hash}.lines"] if cache.is_absolute() else [beside]


def _load(index_path: Path, stat: os.stat_result) -> LineIndex | None:
    """Returns the stored index; None if it is missing or incomplete, or the file has changed."""
    try:
        with index_path.open("rb") as file:
            magic, size, mtime, num_lines, digest = _HEADER.unpack(file.read(_HEADER.size))
        is_complete = index_path.stat().st_size == _HEADER.size + 8 * num_lines
    except (OSError, struct.error):
        return None
    if not is_complete or (magic, size, mtime) != (_MAGIC, stat.st_size, stat.st_mtime_ns):
        return None
    return LineIndex(index_path, num_lines, digest)


def _build(path: str, index_paths: Sequence[Path], stat: os.stat_result) -> LineIndex:
    with open(path, "rb", buffering=0) as file:
        target = _create_file(path, index_paths)
        if target is None:
            ends = np.concatenate(list(_find_ends(file, path, stat)))
            digest = hashlib.blake2b(ends.tobytes(), digest_size=16)
            return LineIndex(ends, len(ends), digest.digest())
        index_path, temporary = target
        with temporary:
            temporary.write(bytes(_HEADER.size))
            digest, num_lines = hashlib.blake2b(digest_size=16), 0
            for ends in _find_ends(file, path, stat):
                temporary.write(ends.tobytes())
                digest.update(ends.tobytes())
                num_lines += len(ends)
            temporary.seek(0)
            version = stat.st_size, stat.st_mtime_ns
            temporary.write(_HEADER.pack(_MAGIC, *version, num_lines, digest.digest()))
            temporary.flush()
            os.chmod(temporary.name, 0o644)
            os.replace(temporary.name, index_path)
            with contextlib.suppress(FileNotFoundError):  # the file was renamed
                temporary.close()
    return LineIndex(index_path, num_lines, digest.digest())


def _create_file(path: str, index_paths: Sequence[Path]) -> tuple[Path, Any] | None:
    """Returns (index path, temporary file) in the first writable folder; None if there is none."""
    refusal = ""
    for index_path in index_paths:
        try:
            index_path.parent.mkdir(parents=True, exist_ok=True)
            prefix = f"{index_path.name}."
            temporary = tempfile.NamedTemporaryFile(dir=index_path.parent, prefix=prefix)  # noqa: SIM115
        except OSError as error:
            refusal = refusal or str(error.strerror)
            continue
        if refusal:
            logger.info(
                f"{shown(path)}: the index of its lines is stored as {index_path}, because the "
                f"file's folder cannot be written ({refusal})"
            )
        return index_path, temporary
    problem = f"the index of its lines cannot be stored ({refusal}): each run rebuilds it"
    logger.warning("%s: %s", shown(path), problem)
    return None


def _find_ends(file: BinaryIO, path: str, stat: os.stat_result) -> Iterator[NDArray[np.uint64]]:
    """Yields arrays of line ends in order, one for each READ_BYTES of the file.

    If the last line has no newline, it ends at the end of the file. Raises ValueError if the file
    changes while it is read.
    """
    offset, ends_with_newline = 0, True
    while raw := file.read(READ_BYTES):
        newlines = np.flatnonzero(np.frombuffer(raw, dtype=np.uint8) == _NEWLINE)
        yield (newlines + (offset + 1)).astype(np.uint64)
        offset, ends_with_newline = offset + len(raw), raw[-1] == _NEWLINE
    if not ends_with_newline:
        yield np.array([offset], dtype=np.uint64)
    elif offset == 0:
        yield np.empty(0, dtype=np.uint64)
    if offset != stat.st_size:
        raise ValueError(f"{shown(path)}: the file changes while it is read")
