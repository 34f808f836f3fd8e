"""Opening of a data source by name: a task, files, a saved data set, or a data set on the hub."""

from functools import partial

from tasks.registry import find_paths, locate_source, open_task, row_format_of
from tasks.source_spec import TASK_FLAG
from tasks.sources.base import DataSource, SourceFile
from tasks.sources.jsonl import JsonlFile, JsonlRows
from tasks.sources.rows import RowFormat


def open_source(name: str, *, flag: str = TASK_FLAG) -> DataSource:
    """Returns the data source of `name`; raises ValueError like `tasks.registry.check_source`."""
    location = locate_source(name, flag=flag)
    if location.kind == "task":
        return open_task(name, location)
    row_format = row_format_of(name)
    if location.kind == "saved":  # imported here, because datasets takes half a second to import
        from tasks.sources.saved_dataset import open_saved

        return open_saved(name, location.path, row_format)
    if location.kind == "hub":
        from tasks.sources.hub import open_hub

        return open_hub(name, location, row_format)
    paths = find_paths(location.path, flag=flag)
    is_plain = all(path.endswith(".jsonl") for path in paths)
    open_rows = partial(JsonlRows, paths, row_format) if is_plain else None
    files: list[SourceFile] = [
        _open_parquet(path, row_format)
        if path.endswith(".parquet")
        else JsonlFile(path, row_format)
        for path in paths
    ]
    return DataSource(name, files, open_rows)


def _open_parquet(path: str, row_format: RowFormat) -> SourceFile:
    from tasks.sources.parquet import ParquetFile  # the import of pyarrow takes 0.2 s

    return ParquetFile(path, row_format)
