"""The lines of plain .jsonl files, read at any place through the index of each."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import BinaryIO

from tasks.file_digest import describe_file
from tasks.jsonl import BYTE_ORDER_MARK
from tasks.line_index import line_index
from tasks.lines import LINES, Form, parse_line
from tasks.registry import shown
from tasks.source import BadLineError, Document

NEWLINE = b"\n"


class JsonlItems:
    """The lines of several files, counted through (see `tasks.source.Items`).

    A line that was edited is read as it is now, as long as it begins and ends where it did.
    """

    def __init__(self, paths: Sequence[str], form: Form = LINES) -> None:
        self._paths, self._form = paths, form
        self._indices = [line_index(path) for path in paths]
        self._starts = [0, *accumulate(len(index) for index in self._indices)]
        self.num_items = self._starts[-1]
        self._open: tuple[int, BinaryIO] | None = None

    @cached_property
    def digest(self) -> str:
        """What the files are: names, sizes, both ends of each, and where all lines end."""
        found = hashlib.blake2b(digest_size=16)
        for path, index in zip(self._paths, self._indices, strict=True):
            found.update(describe_file(path, len(index)))
            found.update(index.digest)
        return found.hexdigest()

    def read(self, number: int) -> Document | BadLineError | None:
        """See `tasks.source.Items.read`."""
        file = bisect_right(self._starts, number) - 1
        line = number - self._starts[file]
        where = f"{shown(self._paths[file])}:{line + 1}"
        raw = self._read_line(file, line, where)
        if line == 0:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        return parse_line(raw, where, self._form) if raw.strip() else None

    def _read_line(self, file: int, line: int, where: str) -> bytes:
        start, end = self._indices[file].span(line)
        before = min(start, 1)  # the end of the line before
        try:
            stream = self._stream(file)
            stream.seek(start - before)
            raw = stream.read(before + end - start)
            is_last = line + 1 == len(self._indices[file])
            is_whole = raw.endswith(NEWLINE) or (is_last and not stream.read(1))
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}") from error
        if len(raw) < before + end - start:
            raise ValueError(f"{where}: the file is shorter than it was")
        if not is_whole or raw[:before] not in (b"", NEWLINE) or NEWLINE in raw[before:-1]:
            raise ValueError(f"{where}: the file changed after its lines had been found")
        return raw[before:]

    def _stream(self, file: int) -> BinaryIO:
        if self._open is not None and self._open[0] == file:
            return self._open[1]
        if self._open is not None:
            self._open[1].close()
            self._open = None
        self._open = file, open(self._paths[file], "rb")  # noqa: SIM115
        return self._open[1]
