"""What --task-name and --evaluation-data may say, checked with the standard library alone.

Adding a registered task is one file with a FORM, how its rows are read (see `tasks.sources.rows`),
and a line in TASKS.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.text import shown
from tasks.source_spec import TASK_FLAG, SourceLocation, SourceSpec
from tasks.sources.rows import LINES

if TYPE_CHECKING:
    from tasks.sources.base import Source
    from tasks.sources.rows import Form

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class TaskEntry:
    """A registered task: it lies at `path`, else on the hub as `hub`; None: nowhere else.

    what: that it is to be put at `path`. opens_itself: `module` has `open_local(name, path)`, which
    makes a source of the path; else that holds files of FORM, or is a data set saved to disk.
    """

    module: str
    path: str
    what: str
    hub: str | None = None
    opens_itself: bool = False

    @property
    def form(self) -> Form:
        """How its rows are read."""
        form: Form = importlib.import_module(self.module).FORM
        return form

    def find(self, name: str, *, flag: str) -> SourceLocation:
        """Where it is.

        Raises:
            ValueError: It is not there, nor can it be on the hub; the text says where to get it.
        """
        if os.path.exists(self.path):
            return (
                SourceLocation(self.path, "task") if self.opens_itself else _local(self.path, flag)
            )
        where = shown(os.path.abspath(self.path))
        missing = f"{flag} {name}: there is no {where}: put there {self.what}"
        if self.hub is None:
            raise ValueError(missing)
        return SourceLocation(self.hub, "hub", missing)

    def open_local(self, name: str, path: str) -> Source:
        """The source that its own layout is.

        Raises:
            ValueError: The layout is another.
        """
        source: Source = importlib.import_module(self.module).open_local(name, path)
        return source


_NATURAL_INSTRUCTIONS = TaskEntry(
    "tasks.natural_instructions",
    os.path.join("data", "natural-instructions"),
    "the repository github.com/allenai/natural-instructions",
    hub="Muennighoff/natural-instructions",
    opens_itself=True,
)

TASKS: dict[str, TaskEntry] = {
    "cot": TaskEntry(
        "tasks.cot",
        os.path.join("data", "mmlu-cot.json"),
        "the chain-of-thought prompts of MMLU as one JSON object {key: text}, the file"
        " mmlu-cot.json that was published with the training data of GPT-JT",
        opens_itself=True,
    ),
    "natural_instructions": _NATURAL_INSTRUCTIONS,
    "ni": _NATURAL_INSTRUCTIONS,
    "p3": TaskEntry(
        "tasks.p3",
        os.path.join("data", "p3"),
        "files of the Public Pool of Prompts with inputs and targets, as huggingface.co/datasets/"
        "Muennighoff/P3 has them",
        hub="Muennighoff/P3",
    ),
    "pile": TaskEntry(
        "tasks.registry",
        os.path.join("data", "pile"),
        "files of the Pile (NN.jsonl.zst), as huggingface.co/datasets/monology/pile-uncopyrighted"
        " has them",
        hub="monology/pile-uncopyrighted",
    ),
}


def check_source(spec: SourceSpec, *, flag: str = TASK_FLAG) -> None:
    """Says early what opening the source would: reads no document, but asks the hub for a name.

    Raises:
        ValueError: It is nothing that --task-name takes, or not there.
    """
    place = find_place(spec.name, flag=flag)
    if place.kind == "files":
        find_paths(place.path, flag=flag)
    elif place.kind == "task":
        TASKS[spec.name].open_local(spec.name, place.path)
    else:  # both of these import this file
        name = "saved_dataset" if place.kind == "saved" else "hub"
        module = importlib.import_module(f"tasks.sources.{name}")
        module.check(place, form_of(spec.name))


def form_of(name: str) -> Form:
    """How the rows of a source are read: a registered task's own way, or what README says."""
    from tasks.sources.rows import LINES  # it imports this file

    return TASKS[name].form if name in TASKS else LINES


def find_place(name: str, *, flag: str = TASK_FLAG) -> SourceLocation:
    """Where a source is; what is on disk goes before the hub.

    Raises:
        ValueError: A registered task is not there, or a saved data set has no split to train on.
    """
    if name in TASKS:
        return TASKS[name].find(name, flag=flag)
    is_file_name = os.path.exists(name) or name.endswith(SUFFIXES)
    if not is_file_name and _HUB_NAME.fullmatch(name):
        return SourceLocation(name, "hub", f"{flag} {shown(name)}: there is no such file or folder")
    return _local(name, flag)


def _local(path: str, flag: str) -> SourceLocation:
    if os.path.isfile(os.path.join(path, "dataset_dict.json")):
        return SourceLocation(os.path.join(path, _training_split(path, flag)), "saved")
    is_saved = all(
        os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_info.json")
    )
    return SourceLocation(path, "saved" if is_saved else "files")


def _training_split(folder: str, flag: str) -> str:
    """The split `train` of several that `datasets` saved in one folder."""
    where = f"{flag} {shown(folder)}"
    try:
        with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
            splits = [str(split) for split in json.load(file)["splits"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: dataset_dict.json does not list the splits") from error
    if "train" not in splits:
        named = shown(", ".join(splits))
        raise ValueError(
            f"{where}: the splits saved there are {named}, and none is train: name the folder of "
            f"one, as {shown(os.path.join(folder, splits[0] if splits else '...'))}"
        )
    return "train"


def find_paths(name: str, *, flag: str) -> list[str]:
    """The files that a path stands for, sorted: itself, or those directly in a folder.

    Raises:
        ValueError: There is none, or one of a kind that is not supported.
    """
    where = f"{flag} {shown(name)}"
    if os.path.isdir(name):
        return _find_in_folder(name, flag)
    if not name.endswith(SUFFIXES):
        is_there = os.path.exists(name) or os.sep not in name
        what = "" if is_there else "there is no such file or folder, "
        raise ValueError(f"{where}: {what}expected {supported()}")
    if not os.path.isfile(name):
        raise ValueError(f"{where}: there is no such file")
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
    return (
        f"a registered task ({', '.join(TASKS)}), a {_suffixes()} file, a folder of such files, "
        "a data set saved to disk by datasets, or a hub name (org/name)"
    )


def _suffixes() -> str:
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


FORM = LINES
