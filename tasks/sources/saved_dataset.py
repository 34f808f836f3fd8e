"""A data set that `datasets` saved to disk, as a source: checked without importing datasets."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property, partial
from pathlib import Path

import datasets
import pyarrow

from common.text import shown
from tasks.source_spec import SourceLocation
from tasks.sources.base import BadLineError, Document, ItemsFile, Source, describe_file, one_line
from tasks.sources.rows import Form, parse_row


def check(place: SourceLocation, form: Form) -> None:
    """Says early that no column counts.

    Raises:
        ValueError: None does, or the folder does not say which there are.
    """
    where = shown(place.path)
    try:
        with open(os.path.join(place.path, "dataset_info.json"), encoding="utf-8") as file:
            columns = list(json.load(file)["features"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: dataset_info.json does not list the columns") from error
    form.of_table(columns, where)


def open_saved(name: str, place: SourceLocation, form: Form) -> Source:
    """The source, whose rows can be read at any place."""
    pass

    open_items = partial(SavedItems, place.path, form)
    return Source(name, [ItemsFile(place.path, open_items)], open_items)


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
