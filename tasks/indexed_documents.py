"""The documents of plain .jsonl files in a true shuffle over all of them, for ever.

Which line comes at which position depends on (seed, epoch, position) alone, so that the state is
two numbers, and restoring reads nothing.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import BinaryIO

from tasks.bad_lines import BadLines
from tasks.documents import State
from tasks.jsonl import BYTE_ORDER_MARK
from tasks.line_index import LineIndex, line_index
from tasks.lines import parse_line
from tasks.permutation import Permutation
from tasks.registry import shown
from tasks.seeds import derive_seed
from tasks.source import BadLineError, Document, Source

SAMPLE_BYTES = 1 << 16  # of each end of a file: an edit that keeps the size is most likely seen


class IndexedDocuments:
    """A source's documents, each once an epoch; `source` is of plain .jsonl files.

    `seed` belongs to this source alone: two equal sources with two seeds differ in order. The files
    are indexed (`tasks.line_index`) when the first document is asked for.
    """

    def __init__(self, source: Source, *, seed: int, bad_lines: BadLines | None = None) -> None:
        self.source = source
        self.bad_lines = bad_lines or BadLines()
        self._seed = seed
        self._go_to(0, 0)

    def _go_to(self, epoch: int, position: int) -> None:
        self.epoch, self._position = epoch, position
        self._found_any = position > 0
        self._order: Permutation | None = None

    def next(self) -> Document:
        """The next document; after the last, the first of another order.

        Raises:
            ValueError: A line is no document (see `tasks.bad_lines`), or the source holds none.
        """
        while True:
            if self._position == self._files.num_lines:
                if not self._found_any:
                    raise self.source.empty_error()
                self._go_to(self.epoch + 1, 0)
                continue
            if self._order is None:
                seed = derive_seed(self._seed, "order", self.epoch)
                self._order = Permutation(self._files.num_lines, seed)
            line = self._order[self._position]
            self._position += 1
            document = self._files.read(line)
            if isinstance(document, BadLineError):
                self.bad_lines.take(document)
            elif document is not None:
                self.bad_lines.note_good()
                self._found_any = True
                return document

    @property
    def num_lines(self) -> int:
        """Of all files, blank ones included."""
        return self._files.num_lines

    @cached_property
    def _files(self) -> _Files:
        return _Files([file.path for file in self.source.files])

    def state(self) -> State:
        """What `restore` needs to go on with the document that `next` would return now."""
        return {"epoch": self.epoch, "position": self._position, "files": self._files.digest}

    def restore(self, state: State) -> None:
        """Goes to where `state` was taken.

        Raises:
            ValueError: The files are not those that the state was taken from.
        """
        if "position" not in state:
            raise ValueError(
                f"{shown(self.source.name)}: the checkpoint was written when .jsonl files were "
                "shuffled chunk by chunk: its place in the data has no meaning any more"
            )
        if state["files"] != self._files.digest:
            raise ValueError(
                f"{shown(self.source.name)}: the source changed since the checkpoint: its files "
                "have other names, sizes or contents"
            )
        self._go_to(state["epoch"], state["position"])


class _Files:
    """The lines of several files, counted through."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._indices = [line_index(path) for path in paths]
        self._starts = [0, *accumulate(len(index) for index in self._indices)]
        self.num_lines = self._starts[-1]
        self._open: tuple[int, BinaryIO] | None = None

    @cached_property
    def digest(self) -> str:
        """What the files are: names, sizes, numbers of lines, and both ends of each."""
        found = hashlib.blake2b(digest_size=16)
        for path, index in zip(self._paths, self._indices, strict=True):
            found.update(_what(path, index))
        return found.hexdigest()

    def read(self, number: int) -> Document | BadLineError | None:
        """The document of a line, or what is wrong with it; None where it is blank."""
        file = bisect_right(self._starts, number) - 1
        line = number - self._starts[file]
        start, end = self._indices[file].span(line)
        stream = self._stream(file)
        stream.seek(start)
        raw = stream.read(end - start)
        where = f"{shown(self._paths[file])}:{line + 1}"
        if len(raw) < end - start:
            raise ValueError(f"{where}: the file is shorter than it was")
        if line == 0:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        return parse_line(raw, where) if raw.strip() else None

    def _stream(self, file: int) -> BinaryIO:
        if self._open is not None and self._open[0] == file:
            return self._open[1]
        if self._open is not None:
            self._open[1].close()
        try:
            stream = open(self._paths[file], "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{shown(self._paths[file])}: {error.strerror}") from error
        self._open = file, stream
        return stream


def _what(path: str, index: LineIndex) -> bytes:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(SAMPLE_BYTES)
        file.seek(max(0, size - SAMPLE_BYTES))
        ends = hashlib.blake2b(first + file.read(SAMPLE_BYTES)).hexdigest()
    return f"{os.path.basename(path)}\0{size}\0{len(index)}\0{ends}\0".encode()
