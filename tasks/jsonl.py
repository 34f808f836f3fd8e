"""Files of one JSON object a line, {"text": "..."}, plain or compressed with zstd, streamed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from tasks.registry import shown
from tasks.source import Document, Record
from tasks.zst import DamagedStream, open_zst

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class JsonlFile:
    """A .jsonl or .jsonl.zst file. Blank lines, CRLF and a byte order mark at its start are fine.

    A record's offset counts bytes of the text: in a compressed file, reading on from one
    decompresses what lies before it.
    """

    path: str

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """See `tasks.source.SourceFile.read`."""
        with self._open() as stream:
            self._skip(stream, offset)
            while raw := self._read_line(stream, line + 1):
                offset, line = offset + len(raw), line + 1
                if line == 1:
                    raw = raw.removeprefix(BYTE_ORDER_MARK)
                if raw.strip():
                    where = self._where(line)
                    yield Record(Document(parse_line(raw, where), where), len(raw), offset, line)

    def _open(self) -> BinaryIO:
        try:
            file = io.BufferedReader(io.FileIO(self.path), READ_BYTES)
        except OSError as error:
            raise ValueError(f"{shown(self.path)}: {error.strerror}") from error
        return open_zst(file) if self.path.endswith(".zst") else file

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


def parse_line(raw: bytes, where: str) -> str:
    """The text of a line.

    Raises:
        ValueError: It is not {"text": "..."} in UTF-8.
    """
    value = _parse_json(raw, where)
    if not isinstance(value, dict):
        raise ValueError(f'{where}: expected an object {{"text": "..."}}, got {_kind(value)}')
    if "text" not in value:
        raise ValueError(f'{where}: the object has no "text"')
    return check_text(value["text"], where)


def _parse_json(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def check_text(value: Any, where: str) -> str:
    """A document's text, as JSON gave it.

    Raises:
        ValueError: It is no string, or one that holds half a character.
    """
    if not isinstance(value, str):
        raise ValueError(f'{where}: expected a string as "text", got {_kind(value)}')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'{where}: "text" holds a lone surrogate') from error
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
