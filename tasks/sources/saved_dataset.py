"""A source in a folder that the library `datasets` has saved (`save_to_disk`)."""

import hashlib
from functools import cached_property, partial
from pathlib import Path

import datasets
import pyarrow

from common.text import one_line, shown
from tasks.sources.base import BadLineError, DataSource, Document, IndexedFile, describe_file
from tasks.sources.rows import RowFormat, parse_row


def open_saved(name: str, folder: str, row_format: RowFormat) -> DataSource:
    """Returns the source of a saved data set; its rows can be read in any order."""
    open_rows = partial(SavedRows, folder, row_format)
    return DataSource(name, [IndexedFile(folder, open_rows)], open_rows)


class SavedRows:
    """The rows of a saved data set (see `tasks.sources.base.IndexedRows`).

    Raises ValueError if the folder is not a saved data set, or has no usable column.
    """

    def __init__(self, folder: str, row_format: RowFormat) -> None:
        self._folder, self._row_format = folder, row_format
        try:
            dataset = datasets.load_from_disk(folder)
        except Exception as error:  # broken files raise many types of errors
            problem = f"not a data set that datasets saved: {one_line(error)}"
            raise ValueError(f"{shown(folder)}: {problem}") from error
        columns = row_format.select_columns(dataset.column_names, shown(folder))
        self._paths = [file["filename"] for file in dataset.cache_files]
        # A data set may be saved in an array format; without a format, rows are Python values.
        self._rows = dataset.select_columns(columns).with_format(None)
        self.num_rows = len(self._rows)

    @cached_property
    def digest(self) -> str:
        """A hash of state.json (it holds the data set's fingerprint) and of the data files.

        Of a data file, it covers name, size, and first and last bytes (see `describe_file`).
        """
        state = Path(self._folder, "state.json").read_bytes()
        digest = hashlib.blake2b(state, digest_size=16)
        for path in self._paths:
            digest.update(describe_file(path, self.num_rows))
        return digest.hexdigest()

    def read(self, row: int) -> Document | BadLineError | None:
        origin = f"{shown(self._folder)}:{row + 1}"
        try:
            value = self._rows[row]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{origin}: {one_line(error)}") from error
        except (ValueError, OverflowError) as error:  # not UTF-8, or no Python value
            return BadLineError(f"{origin}: {one_line(error)}")
        return parse_row(value, origin, self._row_format)
