"""Files with one JSON object per line (see `tasks.sources.rows`), plain or compressed."""

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
from tasks.sources.base import BadLineError, Document, DocumentRecord, describe_file
from tasks.sources.compression import DamagedStream, open_decompressed
from tasks.sources.line_index import load_line_index
from tasks.sources.rows import RowFormat, parse_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
NEWLINE = b"\n"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class JsonlFile:
    """A .jsonl, .jsonl.zst or .jsonl.gz file; blank lines, CRLF and a byte order mark are allowed.

    A record's offset is a number of bytes of the uncompressed text. To continue at an offset in a
    compressed file, all text before the offset is decompressed.
    """

    path: str
    row_format: RowFormat

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        with self._open() as stream:
            self._skip(stream, offset)
            while raw := self._read_line(stream, line + 1):
                offset, line = offset + len(raw), line + 1
                if line == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw.strip():
                    document = parse_line(raw, self._origin(line), self.row_format)
                    yield DocumentRecord(document, len(raw), offset, line)

    def _open(self) -> BinaryIO:
        try:
            file = io.BufferedReader(io.FileIO(self.path), READ_BYTES)
        except OSError as error:
            raise ValueError(f"{shown(self.path)}: {error.strerror}") from error
        return open_decompressed(file, self.path)

    def _skip(self, stream: BinaryIO, offset: int) -> None:
        if stream.seekable():
            stream.seek(offset)
            return
        try:
            while offset > 0 and (skipped := stream.read(min(offset, READ_BYTES))):
                offset -= len(skipped)
        except DamagedStream as error:
            raise ValueError(f"{shown(self.path)}: {error}") from error

    def _read_line(self, stream: BinaryIO, line: int) -> bytes:
        try:
            return stream.readline()
        except DamagedStream as error:
            raise ValueError(f"{self._origin(line)}: {error}") from error

    def _origin(self, line: int) -> str:
        return f"{shown(self.path)}:{line}"


class JsonlRows:
    """The lines of several uncompressed files (see `tasks.sources.base.IndexedRows`).

    If a line is edited during the run, the new text is read. An edit that moves the end of the line
    is an error.
    """

    def __init__(self, paths: Sequence[str], row_format: RowFormat) -> None:
        self._paths, self._row_format = paths, row_format
        self._indices = [load_line_index(path) for path in paths]
        self._first_rows = [0, *accumulate(len(index) for index in self._indices)]
        self.num_rows = self._first_rows[-1]
        self._open: tuple[int, io.FileIO] | None = None  # the most recently read file

    @cached_property
    def digest(self) -> str:
        """A hash of each file's name, size, first and last bytes, and positions of line ends."""
        digest = hashlib.blake2b(digest_size=16)
        for path, index in zip(self._paths, self._indices, strict=True):
            digest.update(describe_file(path, len(index)))
            digest.update(index.digest)
        return digest.hexdigest()

    def read(self, row: int) -> Document | BadLineError | None:
        file = bisect_right(self._first_rows, row) - 1
        line = row - self._first_rows[file]
        origin = f"{shown(self._paths[file])}:{line + 1}"
        raw = self._read_line(file, line, origin)
        if line == 0:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        return parse_line(raw, origin, self._row_format) if raw.strip() else None

    def _read_line(self, file: int, line: int, origin: str) -> bytes:
        """Returns a line; checks the bytes around the line to detect that the file changed."""
        start, end = self._indices[file].span(line)
        before = min(start, 1)
        size = before + end - start
        try:
            buffer = os.pread(self._descriptor(file), size + 1, start - before)
        except OSError as error:
            raise ValueError(f"{origin}: {error.strerror}") from error
        raw, after = buffer[:size], buffer[size:]
        if len(raw) < size:
            raise ValueError(f"{origin}: the file is shorter than it was")
        is_last = line + 1 == len(self._indices[file])
        is_complete = raw.endswith(NEWLINE) or (is_last and not after)
        if not is_complete or raw[:before] not in (b"", NEWLINE) or NEWLINE in raw[before:-1]:
            raise ValueError(f"{origin}: the file changed after its lines were indexed")
        return raw[before:]

    def _descriptor(self, file: int) -> int:
        if self._open is None or self._open[0] != file:
            if self._open is not None:
                self._open[1].close()
                self._open = None
            self._open = file, io.FileIO(self._paths[file])
        return self._open[1].fileno()
