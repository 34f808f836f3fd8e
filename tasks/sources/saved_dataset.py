"""A data set that `datasets` saved to disk, as a source: checked without importing datasets."""

from __future__ import annotations

import json
import os
from functools import partial

from common.text import shown
from tasks.items_file import ItemsFile
from tasks.registry import Place
from tasks.sources.base import Source
from tasks.sources.rows import Form


def check(place: Place, form: Form) -> None:
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


def open_saved(name: str, place: Place, form: Form) -> Source:
    """The source, whose rows can be read at any place."""
    from tasks.saved_items import SavedItems  # datasets takes half a second to import

    open_items = partial(SavedItems, place.path, form)
    return Source(name, [ItemsFile(place.path, open_items)], open_items)
