"""Files of one JSON object a line (see `tasks.sources.rows`), plain or compressed, streamed."""

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

    The offset of a record counts bytes of the text: in a compressed file, reading on from it
    decompresses the text before it.
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
    """The lines of several plain files (see `tasks.sources.base.IndexedRows`).

    A line that is edited meanwhile is read in its new form, as long as it begins and ends where it
    did.
    """

    def __init__(self, paths: Sequence[str], row_format: RowFormat) -> None:
        self._paths, self._row_format = paths, row_format
        self._indices = [load_line_index(path) for path in paths]
        self._first_rows = [0, *accumulate(len(index) for index in self._indices)]
        self.num_rows = self._first_rows[-1]
        self._open: tuple[int, io.FileIO] | None = None  # the file that was read last

    @cached_property
    def digest(self) -> str:
        """Covers names, sizes and both ends of the files, and where all lines end."""
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
        """Reads a line, and the bytes before and after it, to check that the file is the same."""
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
            raise ValueError(f"{origin}: the file changed after its lines had been found")
        return raw[before:]

    def _descriptor(self, file: int) -> int:
        if self._open is None or self._open[0] != file:
            if self._open is not None:
                self._open[1].close()
                self._open = None
            self._open = file, io.FileIO(self._paths[file])
        return self._open[1].fileno()
