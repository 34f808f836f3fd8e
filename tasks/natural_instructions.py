"""The registered task `natural_instructions`, or `ni`: definitions of tasks, and instances of them.

The folder is laid out as the repository allenai/natural-instructions: a file of JSON for each task,
and a list of those that are to train on. An instance's document is

    <definition>

    Input: <input>
    Output: <output>

of which the completion is all after "Output:". Of several outputs the first is taken, so that an
instance is one document. On the hub an instance is a row, with one output.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple

from common.text import shown
from tasks.sources.base import BadLineError, Document, ItemsFile, Source, describe_file
from tasks.sources.rows import Form, answered, check_text, parse_row

logger = logging.getLogger(__name__)

TRAINING_TASKS = os.path.join("splits", "default", "train_tasks.txt")


def parse_instance(row: Mapping[str, Any], where: str) -> Document:
    """The document of an instance with its task's definition.

    Raises:
        BadLineError: One of the three is no text.
    """
    columns = ("definition", "inputs", "targets")
    definition, asked, answer = (check_text(row.get(key), where, key) for key in columns)
    return answered(f"{definition}\n\nInput: {asked}\nOutput:", f" {answer}", where)


FORM = Form(("definition", "inputs", "targets"), parse_instance)


def open_local(name: str, path: str) -> Source:
    """The instances of the training tasks, which can be read at any place.

    Raises:
        ValueError: The folder does not say which tasks these are, or has none of them.
    """
    listed = os.path.join(path, TRAINING_TASKS)
    try:
        with open(listed, encoding="utf-8") as file:
            tasks = sorted({line.strip() for line in file} - {""})
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {shown(listed)}: cannot be read: {error}") from error
    paths = [os.path.join(path, "tasks", f"{task}.json") for task in tasks]
    found = [one for one in paths if os.path.isfile(one)]
    if not found:
        folder = shown(os.path.join(path, "tasks"))
        raise ValueError(f"{name}: {folder}: none of the {len(paths)} training tasks is there")
    if len(found) < len(paths):
        logger.info("%s: %d of %d training tasks are there", name, len(found), len(paths))
    files = [ItemsFile(one, partial(InstructionItems, [one], FORM)) for one in found]
    return Source(name, files, partial(InstructionItems, found, FORM))


_SPACE = re.compile(r"[ \t\n\r]*")


_DECODER = json.JSONDecoder()


class _Task(NamedTuple):
    """A file's definition, and where its instances begin and end, in bytes."""

    definition: str
    starts: array[int]
    ends: array[int]


class InstructionItems:
    """The instances of several files, counted through (see `tasks.sources.base.Items`).

    Raises:
        ValueError: A file cannot be read, or is no task.
    """

    def __init__(self, paths: Sequence[str], form: Form) -> None:
        self._paths, self._form = paths, form
        self._tasks = [_find_instances(path) for path in paths]
        self._firsts = [0, *accumulate(len(task.starts) for task in self._tasks)]
        self.num_items = self._firsts[-1]

    @cached_property
    def digest(self) -> str:
        """What the files are: names, sizes, numbers of instances, and both ends of each."""
        found = hashlib.blake2b(digest_size=16)
        for path, task in zip(self._paths, self._tasks, strict=True):
            found.update(describe_file(path, len(task.starts)))
        return found.hexdigest()

    def read(self, number: int) -> Document | BadLineError | None:
        """See `tasks.sources.base.Items.read`."""
        file = bisect_right(self._firsts, number) - 1
        index = number - self._firsts[file]
        where = f"{shown(self._paths[file])}:{index + 1}"
        try:
            instance = self._read_instance(file, index, where)
        except BadLineError as error:
            return error
        output = instance.get("output")
        if isinstance(output, list):
            output = output[0] if output else None
        row = {
            "definition": self._tasks[file].definition,
            "inputs": instance.get("input"),
            "targets": output,
        }
        return parse_row(row, where, self._form)

    def _read_instance(self, file: int, index: int, where: str) -> dict[str, Any]:
        task = self._tasks[file]
        start, end = task.starts[index], task.ends[index]
        try:
            with open(self._paths[file], "rb") as stream:
                stream.seek(start)
                value = json.loads(stream.read(end - start).decode("utf-8"))
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise BadLineError(f"{where}: not UTF-8: {error.reason}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: the file changed since it was first read") from error
        if not isinstance(value, dict):
            raise BadLineError(f'{where}: expected {{"input": "...", "output": [...]}}')
        return value


def _find_instances(path: str) -> _Task:
    try:
        with open(path, "rb") as file:
            raw = file.read()
        # A character a byte: places in the text are places in the file, and JSON's marks are ASCII.
        found = _Scanner(raw.decode("latin-1")).task()
        definition = json.loads(raw[found[0]].decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{shown(path)}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown(path)}: no task of natural instructions: {error}") from error
    lines = definition if isinstance(definition, list) else [definition]
    return _Task("\n".join(map(str, lines)), *found[1:])


class _Scanner:
    """Finds places in a text of JSON."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 3 if text.startswith("ï»¿") else 0  # a byte order mark

    def task(self) -> tuple[slice, array[int], array[int]]:
        """Where the definition is, and where the instances begin and end."""
        definition: slice | None = None
        instances: tuple[array[int], array[int]] | None = None
        self._take("{")
        while True:
            key = self._value()
            self._take(":")
            if key == "Instances":
                instances = self._places_in_list()
            else:
                start = self._space()
                self._value()
                definition = slice(start, self._at) if key == "Definition" else definition
            if self._take(",}") == "}":
                break
        if definition is None or instances is None:
            raise ValueError('expected "Definition" and "Instances"')
        return definition, *instances

    def _places_in_list(self) -> tuple[array[int], array[int]]:
        starts, ends = array("Q"), array("Q")
        self._take("[")
        if self._text[self._space() : self._at + 1] == "]":
            self._at += 1
            return starts, ends
        while True:
            starts.append(self._space())
            self._value()
            ends.append(self._at)
            if self._take(",]") == "]":
                return starts, ends

    def _value(self) -> Any:
        value, self._at = _DECODER.raw_decode(self._text, self._space())
        return value

    def _take(self, expected: str) -> str:
        mark = self._text[self._space() : self._at + 1]
        if not mark or mark not in expected:
            raise ValueError(f"expected one of {expected} at byte {self._at}")
        self._at += 1
        return mark

    def _space(self) -> int:
        """Passes over white space; where what follows it begins."""
        space = _SPACE.match(self._text, self._at)
        assert space is not None, "it matches nothing too"
        self._at = space.end()
        return self._at
