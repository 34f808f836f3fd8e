"""What --task-name and --evaluation-data may say, checked with the standard library alone.

Adding a registered task is one file that defines `open_files() -> list[SourceFile]` (see
`tasks.source`) and a line in TASKS.
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.source import SourceFile

TASK_FLAG = "--task-name"
SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class TaskEntry:
    """Where a registered task is implemented; None: known, not built yet."""

    module: str | None

    def open_files(self) -> list[SourceFile]:
        """The task's files.

        Raises:
            ValueError: They are not there; the text says where to get them.
        """
        assert self.module is not None
        files: list[SourceFile] = importlib.import_module(self.module).open_files()
        return files


TASKS: dict[str, TaskEntry] = {
    "cot": TaskEntry("tasks.cot"),
    "natural_instructions": TaskEntry(None),
    "ni": TaskEntry(None),
    "p3": TaskEntry(None),
    "pile": TaskEntry(None),
}


@dataclass(frozen=True)
class SourceSpec:
    """One item of --task-name: a task or path, and its weight before normalisation."""

    name: str
    weight: float = 1.0


def parse_task_name(value: str, *, flag: str = TASK_FLAG) -> list[SourceSpec]:
    """Reads `a[:w],b[:w],...`; white space around items goes.

    Raises:
        ValueError: An item is empty, or a weight is not positive and finite.
    """
    return [_parse_item(item.strip(), value, flag) for item in value.split(",")]


def _parse_item(item: str, value: str, flag: str) -> SourceSpec:
    name, weight = _split_weight(item)
    if not name:
        raise ValueError(f"{flag} '{shown(value)}': an item is empty, expected name[:weight],...")
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"{flag} {shown(item)}: expected a positive, finite weight after the ':'")
    return SourceSpec(name, weight)


def _split_weight(item: str) -> tuple[str, float]:
    """The last ':' splits only where a number follows, so that `C:/x` and `/a:b` stay whole."""
    name, colon, tail = item.rpartition(":")
    try:
        return (name.strip(), float(tail)) if colon else (item, 1.0)
    except ValueError:
        return item, 1.0


def check_source(spec: SourceSpec, *, flag: str = TASK_FLAG) -> None:
    """Says early what opening the source would: reads no document.

    Raises:
        ValueError: It is neither a registered task, nor a file or folder that is supported.
    """
    if spec.name in TASKS:
        check_task(spec.name, flag=flag).open_files()
    else:
        find_paths(spec.name, flag=flag)


def check_task(name: str, *, flag: str) -> TaskEntry:
    """The entry of a registered task.

    Raises:
        ValueError: It is not built yet.
    """
    if TASKS[name].module is None:
        raise ValueError(f"{flag} {name} is not built yet")
    return TASKS[name]


def find_paths(name: str, *, flag: str) -> list[str]:
    """The files that a path stands for, sorted: itself, or those directly in a folder.

    Raises:
        ValueError: There is none, or one of a kind that is not supported.
    """
    if os.path.isdir(name):
        return _find_in_folder(name, flag)
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{flag} {shown(name)}: expected {supported()}")
    if not os.path.isfile(name):
        raise ValueError(f"{flag} {shown(name)}: there is no such file")
    return [name]


def _find_in_folder(folder: str, flag: str) -> list[str]:
    try:
        entries = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    except OSError as error:
        raise ValueError(f"{flag} {shown(folder)}: {error.strerror}") from error
    paths = [os.path.join(folder, entry) for entry in entries if entry.endswith(SUFFIXES)]
    files = [path for path in paths if os.path.isfile(path)]
    if not files:
        raise ValueError(f"{flag} {shown(folder)}: the folder holds no {_suffixes()} file")
    return files


def supported() -> str:
    """What a source may be, for messages and --help."""
    tasks = ", ".join(name for name, entry in TASKS.items() if entry.module is not None)
    return f"a registered task ({tasks}), a {_suffixes()} file, or a folder of such files"


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def shown(value: str) -> str:
    """`value` as it may stand in a message of one line."""
    return value if value.isprintable() else ascii(value)
