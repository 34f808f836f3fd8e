"""The documents of one source in shuffled order, for ever, with a state that restores exactly.

The shuffle is buffered: a source is read in order, a chunk of some thousand documents at a time,
and each chunk is shuffled in itself (and a folder's files among themselves). What is drawn depends
on (seed, epoch, chunk) alone, so the state is a place in a file and an index, and restoring reads
one chunk.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

from common.seeds import derive_seed
from common.text import shown
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import BadLineError, Document, Record, Source, State, describe_file

CHUNK_DOCUMENTS = 4096
CHUNK_BYTES = 64 << 20

T = TypeVar("T")


class _Cursor(NamedTuple):
    """A place in an epoch: which of its files in their order, and where in it."""

    file: int = 0
    offset: int = 0
    line: int = 0


class BufferedShuffle:
    """A source's documents, each once an epoch. Holds one chunk in memory.

    `seed` belongs to this source alone: two equal sources with two seeds differ in order.
    """

    def __init__(
        self,
        source: Source,
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

    @property
    def num_lines(self) -> None:
        """Not known without reading all."""
        return None

    def _begin_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._files = _shuffled(self.source.files, self._seed, "files", epoch)
        self._go_to(0, _Cursor())

    def _go_to(self, number: int, start: _Cursor) -> None:
        """Stands before chunk `number`, which begins at `start`, with nothing of it read."""
        self._number = number
        self._start = self._end = start
        self._chunk: list[Document] = []
        self._index = 0
        self._reader = self._read_from(start)

    def next(self) -> Document:
        """The next document; after the last, the first of another order.

        Raises:
            ValueError: A line is no document (see `tasks.sources.bad_lines`), or the source holds
            none.
        """
        while self._index == len(self._chunk):
            self._advance()
        self._index += 1
        return self._chunk[self._index - 1]

    def _advance(self) -> None:
        if self._chunk:
            self._number, self._start = self._number + 1, self._end
            self._chunk, self._index = [], 0
        self._chunk = self._read_chunk()
        if self._chunk:
            return
        if self._number == 0:
            raise self.source.empty_error()
        self._begin_epoch(self.epoch + 1)

    def _read_chunk(self) -> list[Document]:
        documents: list[Document] = []
        size = 0
        for cursor, record in self._reader:
            self._end = cursor
            if isinstance(record.document, BadLineError):
                self.bad_lines.take(record.document)
                continue
            self.bad_lines.note_good()
            documents.append(record.document)
            size += record.size
            if len(documents) >= self._chunk_documents or size >= self._chunk_bytes:
                break
        return _shuffled(documents, self._seed, "chunk", self.epoch, self._number)

    def _read_from(self, start: _Cursor) -> Iterator[tuple[_Cursor, Record]]:
        for number, file in enumerate(self._files):
            if number >= start.file:
                place = (start.offset, start.line) if number == start.file else (0, 0)
                for record in file.read(*place):
                    yield _Cursor(number, record.offset, record.line), record

    def state(self) -> State:
        """What `restore` needs to go on with the document that `next` would return now."""
        return {
            "epoch": self.epoch,
            "chunk": self._number,
            "files": len(self._files),
            "file": os.path.basename(self._files[self._start.file].path),
            "offset": self._start.offset,
            "line": self._start.line,
            "index": self._index,
            "digest": self._digest,
        }

    @cached_property
    def _digest(self) -> str:
        """What the files are; those that are not on a disk have their names alone."""
        found = hashlib.blake2b(digest_size=16)
        for path in sorted(file.path for file in self.source.files):
            found.update(describe_file(path, 0) if os.path.isfile(path) else path.encode())
        return found.hexdigest()

    def restore(self, state: State) -> None:
        """Goes to where `state` was taken, reading one chunk.

        Raises:
            ValueError: The files are not those that the state was taken from.
        """
        if "chunk" not in state:
            raise self._changed("it could be read at any place, and now it is read in order")
        self._begin_epoch(state["epoch"])
        names = [os.path.basename(file.path) for file in self._files]
        if len(names) != state["files"] or state["file"] not in names:
            raise self._changed(f"{len(names)} files, not {state['files']} with {state['file']}")
        if state.get("digest", self._digest) != self._digest:  # older checkpoints have none
            raise self._changed("its files have other sizes or contents")
        start = _Cursor(names.index(state["file"]), state["offset"], state["line"])
        self._go_to(state["chunk"], start)
        if state["index"]:
            self._chunk = self._read_chunk()
        if state["index"] > len(self._chunk):
            raise self._changed(f"{state['file']} is shorter than it was")
        self._index = state["index"]

    def _changed(self, how: str) -> ValueError:
        name = shown(self.source.name)
        return ValueError(f"{name}: the source changed since the checkpoint: {how}")


def _shuffled(items: Sequence[T], *seed: int | str) -> list[T]:
    order = list(items)
    random.Random(derive_seed(*seed)).shuffle(order)
    return order
