"""From the name of a source to its files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tasks.registry import TASKS, find_paths, find_place, form_of
from tasks.source_spec import TASK_FLAG
from tasks.sources.base import Source, SourceFile
from tasks.sources.jsonl import JsonlFile, JsonlItems
from tasks.sources.parquet import ParquetFile
from tasks.sources.rows import Form
from tasks.sources.saved_dataset import open_saved


def open_source(name: str, *, flag: str = TASK_FLAG) -> Source:
    """Finds a source's files; reads none, but asks the hub for a name.

    Raises:
        ValueError: As `tasks.registry.check_source`.
    """
    place = find_place(name, flag=flag)
    if place.kind == "task":
        return TASKS[name].open_local(name, place.path)
    form = form_of(name)
    if place.kind == "saved":
        return open_saved(name, place, form)
    if place.kind == "hub":
        from tasks.sources.hub import open_hub  # datasets takes half a second to import

        return open_hub(name, place, form)
    return _open_files(name, find_paths(place.path, flag=flag), form)


def _open_files(name: str, paths: Sequence[str], form: Form) -> Source:
    is_plain = all(path.endswith(".jsonl") for path in paths)
    open_items = partial(JsonlItems, paths, form) if is_plain else None
    return Source(name, [_file(path, form) for path in paths], open_items)


def _file(path: str, form: Form) -> SourceFile:
    return ParquetFile(path, form) if path.endswith(".parquet") else JsonlFile(path, form)
