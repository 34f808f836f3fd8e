"""A buffered shuffle of a source that can only be read in order: endless and exactly resumable.

The source is read in chunks of a few thousand documents, and each chunk is shuffled. The files of a
folder are read in a random order. The order of the files depends only on (seed, epoch), and the
order in a chunk only on (seed, epoch, chunk number). So the state needs only the epoch, the
chunk's number and position in a file, and an index in the chunk. A restore reads one chunk.
"""

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

from common.seeds import derive_seed
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import (
    BadLineError,
    DataSource,
    Document,
    DocumentRecord,
    State,
    describe_file,
)

CHUNK_DOCUMENTS = 4096
CHUNK_BYTES = 64 << 20

T = TypeVar("T")


class _Position(NamedTuple):
    """A position in an epoch: a file's index in the shuffled order, and a position in the file."""

    file: int = 0
    offset: int = 0
    line: int = 0


class BufferedShuffle:
    """An endless shuffle that yields each document once per epoch; memory holds one chunk.

    Shuffles with different seeds yield the documents of the same source in different orders.
    """

    num_rows = None  # unknown until all rows are read

    def __init__(
        self,
        source: DataSource,
        *,
        seed: int,
        chunk_documents: int = CHUNK_DOCUMENTS,
        chunk_bytes: int = CHUNK_BYTES,
        bad_lines: BadLines | None = None,
    ) -> None:
        self.source = source
        self.bad_lines = bad_lines or BadLines()
        self._seed = seed
        self._chunk_documents = chunk_documents
        self._chunk_bytes = chunk_bytes
        self._begin_epoch(0)

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._files = _shuffle(self.source.files, self._seed, "files", epoch)
        self._move_to(0, _Position())

    def _move_to(self, chunk_index: int, start: _Position) -> None:
        """Moves to the chunk that begins at `start`, without reading the chunk."""
        self._chunk_index = chunk_index
        self._start = self._end = start
        self._chunk: list[Document] = []
        self._index = 0
        self._reader = self._read_from(start)

    def next(self) -> Document:
        """Returns the next document; after the last document the next epoch begins.

        Raises ValueError if a line is bad and bad lines are not skipped (see
        `tasks.sources.bad_lines`), or if the source has no document.
        """
        while self._index == len(self._chunk):
            self._advance()
        self._index += 1
        return self._chunk[self._index - 1]

    def _advance(self) -> None:
        if self._chunk:
            self._chunk_index, self._start = self._chunk_index + 1, self._end
            self._chunk, self._index = [], 0
        self._chunk = self._read_chunk()
        if not self._chunk:
            if self._chunk_index == 0:
                raise self.source.error()
            self._begin_epoch(self.epoch + 1)

    def _read_chunk(self) -> list[Document]:
        documents: list[Document] = []
        size = 0
        for position, record in self._reader:
            self._end = position
            if isinstance(record.document, BadLineError):
                self.bad_lines.skip(record.document)
                continue
            self.bad_lines.note_good()
            documents.append(record.document)
            size += record.size
            if len(documents) >= self._chunk_documents or size >= self._chunk_bytes:
                break
        return _shuffle(documents, self._seed, "chunk", self.epoch, self._chunk_index)

    def _read_from(self, start: _Position) -> Iterator[tuple[_Position, DocumentRecord]]:
        for index, file in enumerate(self._files):
            if index >= start.file:
                offset, line = (start.offset, start.line) if index == start.file else (0, 0)
                for record in file.read(offset, line):
                    yield _Position(index, record.offset, record.line), record

    def state(self) -> State:
        """Returns the state from which `restore` continues with the next document."""
        return {
            "epoch": self.epoch,
            "chunk": self._chunk_index,
            "files": len(self._files),
            "file": os.path.basename(self._files[self._start.file].path),
            "offset": self._start.offset,
            "line": self._start.line,
            "index": self._index,
            "digest": self._digest,
        }

    @cached_property
    def _digest(self) -> str:
        """A hash of all files' names, sizes, first and last bytes; for hub files, of names only."""
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(file.path for file in self.source.files):
            digest.update(describe_file(path, 0) if os.path.isfile(path) else path.encode())
        return digest.hexdigest()

    def restore(self, state: State) -> None:
        """Restores what the method `state` returned; raises ValueError if the files changed."""
        if "chunk" not in state:
            raise self.source.changed_error(
                "it could be read in any order, and can now only be read in file order"
            )
        self._begin_epoch(state["epoch"])
        names = [os.path.basename(file.path) for file in self._files]
        if len(names) != state["files"] or state["file"] not in names:
            raise self.source.changed_error(
                f"{len(names)} files, not {state['files']} files with {state['file']}"
            )
        if state["digest"] != self._digest:
            raise self.source.changed_error("its files have other sizes or contents")
        start = _Position(names.index(state["file"]), state["offset"], state["line"])
        self._move_to(state["chunk"], start)
        if state["index"]:
            self._chunk = self._read_chunk()
        if state["index"] > len(self._chunk):
            raise self.source.changed_error(f"{state['file']} is shorter than it was")
        self._index = state["index"]


def _shuffle(items: Sequence[T], *seed: int | str) -> list[T]:
    order = list(items)
    random.Random(derive_seed(*seed)).shuffle(order)
    return order
