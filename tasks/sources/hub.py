"""A data set of the hub, streamed: its split `train`, in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import RepositoryNotFoundError

from tasks.source_spec import SourceLocation
from tasks.sources.base import Record, Source, one_line, size_of
from tasks.sources.rows import Form, parse_row

HUB_TIMEOUT_SECONDS = 10.0


def check(place: SourceLocation, form: Form) -> None:
    """Asks the hub for the data set, and reads which columns it has.

    Raises:
        ValueError: It cannot be had, or none of its columns counts.
    """
    _reach(place)
    _open_rows(place, form)


def open_hub(name: str, place: SourceLocation, form: Form) -> Source:
    """The source, which can be read in order alone.

    Raises:
        ValueError: The hub cannot be reached, or has no such data set.
    """
    _reach(place)
    return Source(name, [HubRows(place, form)])


@dataclass(frozen=True)
class HubRows:
    """A data set `org/name`, or one configuration of it, `org/name/configuration`.

    A record's offset and line count rows. Reading on from one reads past those before it.
    """

    place: SourceLocation
    form: Form

    @property
    def path(self) -> str:
        """Its name on the hub."""
        return self.place.path

    def read(self, offset: int = 0, line: int = 0) -> Iterator[Record]:
        """See `tasks.sources.base.SourceFile.read`."""
        rows = iter(_open_rows(self.place, self.form).skip(offset))
        for number in itertools.count(offset + 1):
            where = f"{self.path}:{number}"
            try:
                row = next(rows, None)
            except Exception as error:  # the network's, the hub's and the file format's
                raise ValueError(f"{where}: the hub: {one_line(error)}") from error
            if row is None:
                return
            document = parse_row(row, where, self.form)
            yield Record(document, size_of(document), number, number)


def _reach(place: SourceLocation) -> None:
    """Says at once what `datasets` would say after half a minute of attempts."""
    if constants.HF_HUB_OFFLINE:
        return  # datasets then reads what it has kept, or says so at once
    try:
        HfApi().dataset_info(_split(place.path)[0], timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # of the network, or of the hub
        raise _unreachable(place, error) from error


def _open_rows(place: SourceLocation, form: Form) -> Any:
    name, configuration = _split(place.path)
    try:
        rows = datasets.load_dataset(name, configuration, split="train", streaming=True)
        names = rows.column_names or list(next(iter(rows), {}))
    except Exception as error:  # datasets raises what it likes
        raise _unreachable(place, error) from error
    return rows.select_columns(form.of_table(names, f"{place.path} on the hub"))


def _split(path: str) -> tuple[str, str | None]:
    organisation, name, *configuration = path.split("/")
    return f"{organisation}/{name}", configuration[0] if configuration else None


def _unreachable(place: SourceLocation, error: Exception) -> ValueError:
    why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, RepositoryNotFoundError):
        why = "it has none of that name, or none that your token may read"
    return ValueError(f"{place.missing}; and {_split(place.path)[0]} on the hub: {why}")
