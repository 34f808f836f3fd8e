"""The source for a data set on the hub: the data set's split `train`, streamed in order."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from common.text import one_line
from tasks.source_spec import SourceLocation
from tasks.sources.base import DataSource, DocumentRecord, row_record
from tasks.sources.rows import RowFormat, parse_row

HUB_TIMEOUT_SECONDS = 10.0


def check_hub(location: SourceLocation, row_format: RowFormat) -> None:
    """Raises ValueError if the hub has no such data set, or the data set has no usable column."""
    _check_reachable(location)
    _stream_rows(location, row_format)


def open_hub(name: str, location: SourceLocation, row_format: RowFormat) -> DataSource:
    """Returns the source of a data set; raises ValueError if the hub has no such data set."""
    _check_reachable(location)
    return DataSource(name, [HubFile(location, row_format)])


@dataclass(frozen=True)
class HubFile:
    """A data set `org/name`, or a configuration of a data set, `org/name/configuration`.

    A record's offset and line are both the number of its row, counted from 1. A read that continues
    at an offset reads all rows before this offset again.
    """

    location: SourceLocation
    row_format: RowFormat

    @property
    def path(self) -> str:
        """The name of the data set on the hub."""
        return self.location.path

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        rows = iter(_stream_rows(self.location, self.row_format).skip(offset))
        for number in itertools.count(offset + 1):
            origin = f"{self.path}:{number}"
            try:
                row = next(rows, None)
            except Exception as error:  # errors of the network, the hub and the file format
                raise ValueError(f"{origin}: the hub: {one_line(error)}") from error
            if row is None:
                return
            yield row_record(parse_row(row, origin, self.row_format), number)


def _check_reachable(location: SourceLocation) -> None:
    """Raises ValueError if the data set is unreachable; `datasets` reports this only after 30 s."""
    if constants.HF_HUB_OFFLINE:
        return  # offline, datasets reads its cache or fails at once
    try:
        HfApi().dataset_info(_split_path(location.path)[0], timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # errors of the network or the hub
        raise _unavailable(location, error) from error


def _stream_rows(location: SourceLocation, row_format: RowFormat) -> Any:
    name, configuration = _split_path(location.path)
    try:
        rows = datasets.load_dataset(name, configuration, split="train", streaming=True)
        names = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # datasets raises many types of errors
        raise _unavailable(location, error) from error
    return rows.select_columns(row_format.select_columns(names, f"{location.path} on the hub"))


def _split_path(path: str) -> tuple[str, str | None]:
    organisation, name, *configuration = path.split("/")
    return f"{organisation}/{name}", configuration[0] if configuration else None


def _unavailable(location: SourceLocation, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, RepositoryNotFoundError):
        reason = "no such data set, or your token has no access to it"
    name, _ = _split_path(location.path)
    return ValueError(f"{location.missing}; and {name} on the hub: {reason}")
