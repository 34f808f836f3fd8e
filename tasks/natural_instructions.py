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

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from common.text import shown
from tasks.instruction_items import InstructionItems
from tasks.items_file import ItemsFile
from tasks.sources.base import Document, Source
from tasks.sources.rows import Form, answered, check_text

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
