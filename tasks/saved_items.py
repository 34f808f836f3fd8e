"""The rows of a data set that `datasets` saved to disk, mapped, read at any place."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import datasets
import pyarrow

from common.text import shown
from tasks.file_digest import describe_file
from tasks.sources.base import BadLineError, Document, one_line
from tasks.sources.rows import Form, parse_row


class SavedItems:
    """The rows of a folder (see `tasks.sources.base.Items`); columns that do not count are not
    read.

    Raises:
        ValueError: The folder is no such data set, or none of its columns counts.
    """

    def __init__(self, folder: str, form: Form) -> None:
        self._folder, self._form = folder, form
        where = shown(folder)
        try:
            data = datasets.load_from_disk(folder)
        except Exception as error:  # what is missing or broken raises anything
            why = one_line(error)
            raise ValueError(f"{where}: not a data set that datasets saved: {why}") from error
        columns = form.of_table(data.column_names, where)
        self._files = [file["filename"] for file in data.cache_files]
        # It may have been saved as one of arrays: rows are wanted as Python has them.
        self._rows = data.select_columns(columns).with_format(None)
        self.num_items = len(self._rows)

    @cached_property
    def digest(self) -> str:
        """What datasets says of the data, and what its files are."""
        found = hashlib.blake2b(Path(self._folder, "state.json").read_bytes(), digest_size=16)
        for path in self._files:
            found.update(describe_file(path, self.num_items))
        return found.hexdigest()

    def read(self, number: int) -> Document | BadLineError | None:
        """See `tasks.sources.base.Items.read`."""
        where = f"{shown(self._folder)}:{number + 1}"
        try:
            row = self._rows[number]
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        except (ValueError, OverflowError) as error:  # no UTF-8, or nothing that Python has
            return BadLineError(f"{where}: {one_line(error)}")
        return parse_row(row, where, self._form)
