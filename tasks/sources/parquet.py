"""Parquet files, a row a document, with the columns that a line of `tasks.sources.rows` has as
keys."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import parquet

from common.text import shown
from tasks.sources.base import BadLineError, Document, Record, one_line
from tasks.sources.rows import LINES, Form, parse_row

BATCH_ROWS = 256


@dataclass(frozen=True)
class ParquetFile:
    """A .parquet file; other columns than `form` has are not read. Holds a row group in memory.

    A record's offset counts rows.
    """

    path: str
    form: Form = LINES

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """See `tasks.sources.base.SourceFile.read`."""
        try:
            # As bytes: a name may be no UTF-8.
            with pyarrow.OSFile(os.fsencode(self.path)) as opened:
                file = parquet.ParquetFile(opened)
                for row, value in self._rows(file, offset):
                    where = f"{shown(self.path)}:{row + 1}"
                    yield Record(self._parse(value, where), _size(value), row + 1, row + 1)
        except OSError as error:
            why = error.strerror or one_line(error)
            raise ValueError(f"{shown(self.path)}: {why}") from error
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter: of a name
            why = f"not valid parquet: {one_line(error)}"
            raise ValueError(f"{shown(self.path)}: {why}") from error

    def _parse(self, value: Any, where: str) -> Document | BadLineError:
        if isinstance(value, Exception):
            return BadLineError(f"{where}: {one_line(value)}")
        return parse_row(value, where, self.form)

    def _rows(self, file: Any, offset: int) -> Iterator[tuple[int, Any]]:
        columns = self.form.of_table(file.schema_arrow.names, shown(self.path))
        first = 0
        for group in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if after > offset:
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                rows = (value for batch in batches for value in _values(batch))
                for row, value in enumerate(rows, first):
                    if row >= offset:
                        yield row, value
            first = after


def _values(batch: Any) -> Iterator[Any]:
    """A batch's rows; in place of one that Python has no value for (no UTF-8, ...) its error."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        yield from (_value(batch.slice(row, 1)) for row in range(batch.num_rows))


def _value(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return error


def _size(value: Any) -> int:
    """About its bytes in memory."""
    if isinstance(value, dict):
        return sum(_size(one) for one in value.values())
    if isinstance(value, list):
        return sum(_size(one) for one in value)
    return len(value) if isinstance(value, str) else 0
