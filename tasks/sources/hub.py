"""A data set of the hub, streamed: its split `train`, in order."""

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
    """Raises ValueError if the hub has no such data set, or it has no column that is read."""
    _check_reachable(location)
    _stream_rows(location, row_format)


def open_hub(name: str, location: SourceLocation, row_format: RowFormat) -> DataSource:
    """Returns the source, to be read in order; raises ValueError if the hub has none of it."""
    _check_reachable(location)
    return DataSource(name, [HubFile(location, row_format)])


@dataclass(frozen=True)
class HubFile:
    """A data set `org/name`, or one configuration of it, `org/name/configuration`.

    The offset and line of a record count rows. Reading on from it reads the rows before it.
    """

    location: SourceLocation
    row_format: RowFormat

    @property
    def path(self) -> str:
        """Returns its name on the hub."""
        return self.location.path

    def read(self, offset: int = 0, line: int = 0) -> Iterator[DocumentRecord]:
        rows = iter(_stream_rows(self.location, self.row_format).skip(offset))
        for number in itertools.count(offset + 1):
            origin = f"{self.path}:{number}"
            try:
                row = next(rows, None)
            except Exception as error:  # the network's, the hub's and the file format's
                raise ValueError(f"{origin}: the hub: {one_line(error)}") from error
            if row is None:
                return
            yield row_record(parse_row(row, origin, self.row_format), number)


def _check_reachable(location: SourceLocation) -> None:
    """Fails at once, where `datasets` would fail after half a minute of attempts."""
    if constants.HF_HUB_OFFLINE:
        return  # datasets then reads its cache, or fails at once
    try:
        HfApi().dataset_info(_split_path(location.path)[0], timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # of the network, or of the hub
        raise _unavailable(location, error) from error


def _stream_rows(location: SourceLocation, row_format: RowFormat) -> Any:
    name, configuration = _split_path(location.path)
    try:
        rows = datasets.load_dataset(name, configuration, split="train", streaming=True)
        names = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # datasets raises anything
        raise _unavailable(location, error) from error
    return rows.select_columns(row_format.select_columns(names, f"{location.path} on the hub"))


def _split_path(path: str) -> tuple[str, str | None]:
    organisation, name, *configuration = path.split("/")
    return f"{organisation}/{name}", configuration[0] if configuration else None


def _unavailable(location: SourceLocation, error: Exception) -> ValueError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, RepositoryNotFoundError):
        reason = "it has none of that name, or none that your token may read"
    name, _ = _split_path(location.path)
    return ValueError(f"{location.missing}; and {name} on the hub: {reason}")
