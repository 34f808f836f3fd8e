"""The registered task `natural_instructions`, or `ni`: many language tasks with their instances.

The data folder has the layout of the repository allenai/natural-instructions: a JSON file for each
language task, with its definition and instances, and a list of the language tasks to train on. The
document of an instance is

    <definition>

    Input: <input>
    Output: <output>

and its completion is the text after "Output:". If an instance has several outputs, only the first
output is used. The data set on the hub has one output in each row, and each row is a document.
"""

import hashlib
import json
import logging
import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from common.text import shown
from tasks.sources.base import BadLineError, DataSource, Document, IndexedFile, describe_file
from tasks.sources.rows import RowFormat, check_text, parse_row, prompt_document, read_json

logger = logging.getLogger(__name__)

TRAINING_TASKS = os.path.join("splits", "default", "train_tasks.txt")


COLUMNS = ("definition", "inputs", "targets")


def _parse(row: Mapping[str, Any], origin: str) -> Document:
    definition, inputs, targets = (check_text(row.get(key), origin, key) for key in COLUMNS)
    return prompt_document(f"{definition}\n\nInput: {inputs}\nOutput:", f" {targets}", origin)


ROW_FORMAT = RowFormat(COLUMNS, _parse)


def open_local(name: str, path: str) -> DataSource:
    """Returns the source of the training tasks; raises ValueError if the folder has none."""
    task_list = os.path.join(path, TRAINING_TASKS)
    try:
        with open(task_list, encoding="utf-8") as file:
            tasks = sorted({line.strip() for line in file} - {""})
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {shown(task_list)}: cannot be read: {error}") from error
    expected = [os.path.join(path, "tasks", f"{task}.json") for task in tasks]
    paths = [task_path for task_path in expected if os.path.isfile(task_path)]
    if not paths:
        folder = shown(os.path.join(path, "tasks"))
        raise ValueError(f"{name}: {folder}: has none of the {len(expected)} training tasks")
    if len(paths) < len(expected):
        logger.info("%s: found %d of %d training tasks", name, len(paths), len(expected))
    files = [IndexedFile(task_path, partial(InstanceRows, [task_path])) for task_path in paths]
    return DataSource(name, files, partial(InstanceRows, paths))


class InstanceRows:
    """The instances of several task files, as rows (see `tasks.sources.base.IndexedRows`).

    Each file is parsed once, and its instances are copied to a temporary file, one per line, for
    fast reads in any order. Memory holds only one file at a time. Raises ValueError if a file
    cannot be read or is not a task.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._definitions: list[str] = []
        self._copy = tempfile.TemporaryFile()  # noqa: SIM115
        self._line_starts = array("Q", [0])
        num_instances, digest = [], hashlib.blake2b(digest_size=16)
        for path in paths:
            definition, instances = _load_task(path)
            self._definitions.append(definition)
            num_instances.append(len(instances))
            digest.update(describe_file(path, len(instances)))
            self._copy_instances(instances)
        self._first_rows = [0, *accumulate(num_instances)]
        self.num_rows = self._first_rows[-1]
        self.digest = digest.hexdigest()

    def _copy_instances(self, instances: list[Any]) -> None:
        try:
            for instance in instances:
                size = self._copy.write(json.dumps(instance).encode())
                self._line_starts.append(self._line_starts[-1] + size)
            self._copy.flush()
        except OSError as error:
            raise ValueError(
                f"{tempfile.gettempdir()}: the instances cannot be copied there: "
                f"{error.strerror}: set TMPDIR to a folder with more space"
            ) from error

    def read(self, row: int) -> Document | BadLineError | None:
        file = bisect_right(self._first_rows, row) - 1
        origin = f"{shown(self._paths[file])}:{row - self._first_rows[file] + 1}"
        start, end = self._line_starts[row : row + 2]
        instance = json.loads(os.pread(self._copy.fileno(), end - start, start))
        if not isinstance(instance, dict):
            return BadLineError(f'{origin}: expected {{"input": "...", "output": [...]}}')
        output = instance.get("output")
        if isinstance(output, list):
            output = output[0] if output else None
        values = (self._definitions[file], instance.get("input"), output)
        return parse_row(dict(zip(COLUMNS, values, strict=True)), origin, ROW_FORMAT)


def _load_task(path: str) -> tuple[str, list[Any]]:
    """Returns definition and instances of a task file; raises ValueError for any other file."""
    problem = "not a task of natural instructions"
    task = read_json(path, problem)
    keys = task if isinstance(task, dict) else {}
    definition, instances = keys.get("Definition"), keys.get("Instances")
    if definition is None or not isinstance(instances, list):
        expected = 'expected "Definition" and a list of "Instances"'
        raise ValueError(f"{shown(path)}: {problem}: {expected}")
    lines = definition if isinstance(definition, list) else [definition]
    return "\n".join(map(str, lines)), instances
