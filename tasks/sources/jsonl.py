"""Files of one JSON object a line (see `tasks.sources.rows`), plain or compressed, streamed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from common.text import shown
from tasks.sources.base import Record
from tasks.sources.compression import DamagedStream, decompressed
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
