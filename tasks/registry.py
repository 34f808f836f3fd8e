"""The registered tasks, and checks of the sources in --task-name and --evaluation-data.

A registered task is an entry in TASKS. If a task has its own row format (see `tasks.sources.rows`),
a separate Python module, such as `tasks.p3`, defines this format. This module imports no torch.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from common.text import shown
from tasks import cot, natural_instructions, p3
from tasks.source_spec import TASK_FLAG, SourceLocation, SourceSpec
from tasks.sources.base import DataSource
from tasks.sources.rows import TEXT_OR_CHAT, RowFormat

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class TaskEntry:
    """A registered task.

    path: the location of its data on disk.
    description: describes the expected data, for the error about a missing `path`.
    row_format: the format of its rows.
    hub: the data set on the hub that is used if `path` is missing; None: there is none.
    open_local: opens `path` if its layout is neither files of rows nor a saved data set.
    """

    path: str
    description: str
    row_format: RowFormat = TEXT_OR_CHAT
    hub: str | None = None
    open_local: Callable[[str, str], DataSource] | None = None

    def locate(self, name: str, *, flag: str) -> SourceLocation:
        """Returns the data's location; raises ValueError if `path` is missing and `hub` is None."""
        if os.path.exists(self.path):
            if self.open_local is not None:
                return SourceLocation(self.path, "task")
            return _locate_path(self.path, flag)
        path = shown(os.path.abspath(self.path))
        missing = f"{flag} {name}: {path} does not exist: put this data there: {self.description}"
        if self.hub is None:
            raise ValueError(missing)
        return SourceLocation(self.hub, "hub", missing)


_NATURAL_INSTRUCTIONS = TaskEntry(
    os.path.join("data", "natural-instructions"),
    "the repository github.com/allenai/natural-instructions",
    natural_instructions.ROW_FORMAT,
    hub="Muennighoff/natural-instructions",
    open_local=natural_instructions.open_local,
)

TASKS: dict[str, TaskEntry] = {
    "cot": TaskEntry(
        os.path.join("data", "mmlu-cot.json"),
        "the chain-of-thought prompts of MMLU as one JSON object {key: text}, the file"
        " mmlu-cot.json that was published with the training data of GPT-JT",
        open_local=cot.open_local,
    ),
    "natural_instructions": _NATURAL_INSTRUCTIONS,
    "ni": _NATURAL_INSTRUCTIONS,
    "p3": TaskEntry(
        os.path.join("data", "p3"),
        "files of the Public Pool of Prompts with inputs and targets, as huggingface.co/datasets/"
        "Muennighoff/P3 has them",
        p3.ROW_FORMAT,
        hub="Muennighoff/P3",
    ),
    "pile": TaskEntry(
        os.path.join("data", "pile"),
        "files of the Pile (NN.jsonl.zst), as huggingface.co/datasets/monology/pile-uncopyrighted"
        " has them",
        hub="monology/pile-uncopyrighted",
    ),
}


def check_source(spec: SourceSpec, *, flag: str = TASK_FLAG) -> None:
    """Checks before training that a source exists; reads no document, but may ask the hub.

    Raises ValueError if the source is missing or not supported.
    """
    location = locate_source(spec.name, flag=flag)
    if location.kind == "files":
        find_paths(location.path, flag=flag)
    elif location.kind == "task":
        open_task(spec.name, location)
    elif location.kind == "saved":
        _check_saved_columns(location.path, row_format_of(spec.name))
    else:
        from tasks.sources.hub import check_hub  # imports datasets, which is slow

        check_hub(location, row_format_of(spec.name))


def open_task(name: str, location: SourceLocation) -> DataSource:
    """Opens a task with its own file layout; raises ValueError if the files have another layout."""
    open_local = TASKS[name].open_local
    assert open_local is not None, "the location is of kind task"
    return open_local(name, location.path)


def row_format_of(name: str) -> RowFormat:
    """Returns the row format of a source: a registered task's own format, else TEXT_OR_CHAT."""
    return TASKS[name].row_format if name in TASKS else TEXT_OR_CHAT


def locate_source(name: str, *, flag: str = TASK_FLAG) -> SourceLocation:
    """Locates a source on disk, else on the hub; raises ValueError for a task without data."""
    if name in TASKS:
        return TASKS[name].locate(name, flag=flag)
    is_file_name = os.path.exists(name) or name.endswith(SUFFIXES)
    if not is_file_name and _HUB_NAME.fullmatch(name):
        return SourceLocation(name, "hub", f"{flag} {shown(name)}: there is no such file or folder")
    return _locate_path(name, flag)


def _locate_path(path: str, flag: str) -> SourceLocation:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return SourceLocation(os.path.join(path, _training_split(path, flag)), "saved")
    names = ("state.json", "dataset_info.json")
    is_saved = all(os.path.isfile(os.path.join(path, name)) for name in names)
    return SourceLocation(path, "saved" if is_saved else "files")


def _training_split(folder: str, flag: str) -> str:
    """Returns "train" if a saved data set has this split; raises ValueError otherwise."""
    prefix = f"{flag} {shown(folder)}"
    splits = _read_names(folder, "dataset_dict.json", "splits", prefix, "splits")
    if "train" not in splits:
        names = shown(", ".join(splits))
        raise ValueError(
            f"{prefix}: the saved splits are {names}, there is no split train: give the folder of "
            f"a split, such as {shown(os.path.join(folder, splits[0] if splits else '...'))}"
        )
    return "train"


def _check_saved_columns(folder: str, row_format: RowFormat) -> None:
    """Raises ValueError if a saved data set has no usable column; reads only a JSON file."""
    columns = _read_names(folder, "dataset_info.json", "features", shown(folder), "columns")
    row_format.select_columns(columns, shown(folder))


def _read_names(folder: str, file_name: str, key: str, prefix: str, kind: str) -> list[str]:
    try:
        with open(os.path.join(folder, file_name), encoding="utf-8") as file:
            return [str(name) for name in json.load(file)[key]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{prefix}: {file_name} does not list the {kind}") from error


def find_paths(name: str, *, flag: str) -> list[str]:
    """Returns the path of a file, or the sorted paths of a folder's supported files.

    Raises ValueError if there is no supported file.
    """
    prefix = f"{flag} {shown(name)}"
    if os.path.isdir(name):
        return _find_in_folder(name, flag)
    if not name.endswith(SUFFIXES):
        may_be_task = os.path.exists(name) or os.sep not in name
        missing = "" if may_be_task else "there is no such file or folder, "
        raise ValueError(f"{prefix}: {missing}expected {describe_supported()}")
    if not os.path.isfile(name):
        raise ValueError(f"{prefix}: there is no such file")
    return [name]


def _find_in_folder(folder: str, flag: str) -> list[str]:
    try:
        entries = sorted(entry for entry in os.listdir(folder) if not entry.startswith("."))
    except OSError as error:
        raise ValueError(f"{flag} {shown(folder)}: {error.strerror}") from error
    paths = (os.path.join(folder, entry) for entry in entries if entry.endswith(SUFFIXES))
    if not (files := [path for path in paths if os.path.isfile(path)]):
        raise ValueError(f"{flag} {shown(folder)}: the folder holds no {_list_suffixes()} file")
    return files


def describe_supported() -> str:
    """Returns a description of the supported kinds of sources, for errors and --help."""
    return (
        f"a registered task ({', '.join(TASKS)}), a {_list_suffixes()} file, a folder of such "
        "files, a data set saved to disk by datasets, or a hub name (org/name)"
    )


def _list_suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
