"""Parquet files, a row a document, with the columns that a line of `tasks.lines` has as keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import parquet

from tasks.lines import parse_row
from tasks.registry import shown
from tasks.source import Record

COLUMNS = ("text", "prompt", "completion", "messages")
BATCH_ROWS = 256


@dataclass(frozen=True)
class ParquetFile:
    """A .parquet file; other columns than COLUMNS are not read. Holds a row group in memory.

    A record's offset counts rows.
    """

    path: str

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """See `tasks.source.SourceFile.read`."""
        try:
            with parquet.ParquetFile(self.path) as file:
                for row, value in self._rows(file, offset):
                    where = f"{shown(self.path)}:{row + 1}"
                    yield Record(parse_row(value, where), _size(value), row + 1, row + 1)
        except OSError as error:
            why = error.strerror or _one_line(error)
            raise ValueError(f"{shown(self.path)}: {why}") from error
        except pyarrow.ArrowException as error:
            why = f"not valid parquet: {_one_line(error)}"
            raise ValueError(f"{shown(self.path)}: {why}") from error

    def _rows(self, file: Any, offset: int) -> Iterator[tuple[int, dict[str, Any]]]:
        columns = [name for name in COLUMNS if name in file.schema_arrow.names]
        if not columns:
            names = ", ".join(COLUMNS)
            raise ValueError(f"{shown(self.path)}: it has none of the columns {names}")
        first = 0
        for group in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if after > offset:
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
                rows = (value for batch in batches for value in batch.to_pylist())
                for row, value in enumerate(rows, first):
                    if row >= offset:
                        yield row, value
            first = after


def _size(value: Any) -> int:
    """About its bytes in memory."""
    if isinstance(value, dict):
        return sum(_size(one) for one in value.values())
    if isinstance(value, list):
        return sum(_size(one) for one in value)
    return len(value) if isinstance(value, str) else 0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
