"""Files of one JSON object a line (see `tasks.sources.rows`), plain or compressed, streamed."""

from __future__ import annotations

import hashlib
import io
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import BinaryIO

from common.text import shown
from tasks.sources.base import BadLineError, Document, Record, describe_file
from tasks.sources.compression import DamagedStream, decompressed
from tasks.sources.line_index import line_index
from tasks.sources.rows import LINES, Form, parse_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class JsonlFile:
    """A .jsonl, .jsonl.zst or .jsonl.gz file.

    Blank lines, CRLF and a byte order mark at its start are fine.

    A record's offset counts bytes of the text: in a compressed file, reading on from one
    decompresses what lies before it.
    """

    path: str
    form: Form = LINES

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """See `tasks.sources.base.SourceFile.read`."""
        with self._open() as stream:
            self._skip(stream, offset)
            while raw := self._read_line(stream, line + 1):
                offset, line = offset + len(raw), line + 1
                if line == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw.strip():
                    document = parse_line(raw, self._where(line), self.form)
                    yield Record(document, len(raw), offset, line)

    def _open(self) -> BinaryIO:
        try:
            file = io.BufferedReader(io.FileIO(self.path), READ_BYTES)
        except OSError as error:
            raise ValueError(f"{shown(self.path)}: {error.strerror}") from error
        return decompressed(file, self.path)

    def _skip(self, stream: BinaryIO, offset: int) -> None:
        if stream.seekable():
            stream.seek(offset)
            return
        try:
            while offset > 0 and (piece := stream.read(min(offset, READ_BYTES))):
                offset -= len(piece)
        except DamagedStream as error:
            raise ValueError(f"{shown(self.path)}: {error}") from error

    def _read_line(self, stream: BinaryIO, line: int) -> bytes:
        try:
            return stream.readline()
        except DamagedStream as error:
            raise ValueError(f"{self._where(line)}: {error}") from error

    def _where(self, line: int) -> str:
        return f"{shown(self.path)}:{line}"


NEWLINE = b"\n"


class JsonlItems:
    """The lines of several files, counted through (see `tasks.sources.base.Items`).

    A line that was edited is read as it is now, as long as it begins and ends where it did.
    """

    def __init__(self, paths: Sequence[str], form: Form = LINES) -> None:
        self._paths, self._form = paths, form
        self._shown = [shown(path) for path in paths]
        self._indices = [line_index(path) for path in paths]
        self._starts = [0, *accumulate(len(index) for index in self._indices)]
        self.num_items = self._starts[-1]
        self._open: tuple[int, io.FileIO] | None = None

    @cached_property
    def digest(self) -> str:
        """What the files are: names, sizes, both ends of each, and where all lines end."""
        found = hashlib.blake2b(digest_size=16)
        for path, index in zip(self._paths, self._indices, strict=True):
            found.update(describe_file(path, len(index)))
            found.update(index.digest)
        return found.hexdigest()

    def read(self, number: int) -> Document | BadLineError | None:
        """See `tasks.sources.base.Items.read`."""
        file = bisect_right(self._starts, number) - 1
        line = number - self._starts[file]
        where = f"{self._shown[file]}:{line + 1}"
        raw = self._read_line(file, line, where)
        if line == 0:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        return parse_line(raw, where, self._form) if raw.strip() else None

    def _read_line(self, file: int, line: int, where: str) -> bytes:
        start, end = self._indices[file].span(line)
        before = min(start, 1)  # the end of the line before
        size = before + end - start
        try:
            found = os.pread(self._descriptor(file), size + 1, start - before)
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}") from error
        raw, after = found[:size], found[size:]
        if len(raw) < size:
            raise ValueError(f"{where}: the file is shorter than it was")
        is_last = line + 1 == len(self._indices[file])
        is_whole = raw.endswith(NEWLINE) or (is_last and not after)
        if not is_whole or raw[:before] not in (b"", NEWLINE) or NEWLINE in raw[before:-1]:
            raise ValueError(f"{where}: the file changed after its lines had been found")
        return raw[before:]

    def _descriptor(self, file: int) -> int:
        if self._open is None or self._open[0] != file:
            if self._open is not None:
                self._open[1].close()
                self._open = None
            self._open = file, io.FileIO(self._paths[file])
        return self._open[1].fileno()
