"""Parquet files: each row is a document; the column names are the keys in `tasks.sources.rows`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import parquet

from common.text import one_line, shown
from tasks.sources.base import BadLineError, Document, DocumentRecord
from tasks.sources.rows import RowFormat, parse_row

BATCH_ROWS = 256


@dataclass(frozen=True)
class ParquetFile:
    """A .parquet file; `read` reads only the columns of `row_format`, one row group at a time.

    A record's offset and line are both the number of rows read.
    """

    path: str
    row_format: RowFormat

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        try:
            with pyarrow.OSFile(os.fsencode(self.path)) as stream:  # a name may not be UTF-8
                file = parquet.ParquetFile(stream)
                for row, value in self._read_rows(file, offset):
                    document = self._parse(value, f"{shown(self.path)}:{row + 1}")
                    yield DocumentRecord(document, _num_characters(value), row + 1, row + 1)
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise ValueError(f"{shown(self.path)}: {reason}") from error
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # e.g. a column name
            reason = f"not valid parquet: {one_line(error)}"
            raise ValueError(f"{shown(self.path)}: {reason}") from error

    def _parse(self, value: Any, origin: str) -> Document | BadLineError:
        if isinstance(value, Exception):
            return BadLineError(f"{origin}: {one_line(value)}")
        return parse_row(value, origin, self.row_format)

    def _read_rows(self, file: Any, offset: int) -> Iterator[tuple[int, Any]]:
        columns = self.row_format.select_columns(file.schema_arrow.names, shown(self.path))
        first = 0
        for group in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if after > offset:
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                values = (value for batch in batches for value in _batch_values(batch))
                for row, value in enumerate(values, first):
                    if row >= offset:
                        yield row, value
            first = after


def _batch_values(batch: Any) -> Iterator[Any]:
    """Yields the rows of a batch; for a row that Python cannot represent, yields the error."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        yield from (_row_value(batch.slice(row, 1)) for row in range(batch.num_rows))


def _row_value(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        return error


def _num_characters(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_num_characters(item) for item in value.values())
    if isinstance(value, list):
        return sum(_num_characters(item) for item in value)
    return len(value) if isinstance(value, str) else 0
