"""The flag --task-name: sources and their weights. The module imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from common.text import shown

TASK_FLAG = "--task-name"


@dataclass(frozen=True)
class SourceLocation:
    """The location of a source's documents: a path, or a name on the hub.

    kind: the kind of location; "task" is a special layout, opened by a registered task's module.
    missing: for kind "hub", a text that says that the data are not on disk. If they cannot be
        opened on the hub either, the error begins with this text.
    """

    path: str
    kind: Literal["files", "saved", "hub", "task"]
    missing: str = ""


@dataclass(frozen=True)
class SourceSpec:
    """An item of --task-name: a source (a task, a path, or a name on the hub) and its weight."""

    name: str
    weight: float = 1.0


def parse_task_name(value: str) -> list[SourceSpec]:
    """Returns the items of `a[:w],b[:w],...`; ignores white space around items.

    Raises ValueError if an item is empty, or if a weight is not positive and finite.
    """
    return [_parse_item(item.strip(), value) for item in value.split(",")]


def _parse_item(item: str, value: str) -> SourceSpec:
    name, weight = _split_weight(item)
    if not name:
        raise ValueError(
            f"{TASK_FLAG} '{shown(value)}': an item is empty, expected name[:weight],..."
        )
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"{TASK_FLAG} {shown(item)}: expected a positive, finite weight after the ':'"
        )
    return SourceSpec(name, weight)


def _split_weight(item: str) -> tuple[str, float]:
    """Returns name and weight; splits at the last ':' only if a number follows the ':'."""
    name, colon, tail = item.rpartition(":")
    try:
        return (name.strip(), float(tail)) if colon else (item, 1.0)
    except ValueError:
        return item, 1.0
