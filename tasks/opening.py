"""From the name of a source to its files."""

from __future__ import annotations

from tasks.jsonl import JsonlFile
from tasks.parquet import ParquetFile
from tasks.registry import TASK_FLAG, TASKS, check_task, find_paths
from tasks.source import Source, SourceFile


def open_source(name: str, *, flag: str = TASK_FLAG) -> Source:
    """Finds a source's files; reads none.

    Raises:
        ValueError: As `tasks.registry.check_source`.
    """
    if name in TASKS:
        return Source(name, check_task(name, flag=flag).open_files())
    return Source(name, [_file(path) for path in find_paths(name, flag=flag)])


def _file(path: str) -> SourceFile:
    return ParquetFile(path) if path.endswith(".parquet") else JsonlFile(path)
