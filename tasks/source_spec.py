"""Parses --task-name: sources and their weights. Needs no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from common.text import shown

TASK_FLAG = "--task-name"


@dataclass(frozen=True)
class SourceLocation:
    """The location of a source's documents: a path of some kind, or a name on the hub.

    kind: "task" is a layout of its own, which the module of a registered task opens.
    missing: the path that is missing, where the hub replaces it, for errors.
    """

    path: str
    kind: Literal["files", "saved", "hub", "task"]
    missing: str = ""


@dataclass(frozen=True)
class SourceSpec:
    """An item of --task-name: a task, path or hub name, and its weight before normalisation."""

    name: str
    weight: float = 1.0


def parse_task_name(value: str, *, flag: str = TASK_FLAG) -> list[SourceSpec]:
    """Parses `a[:w],b[:w],...`; white space around items is ignored.

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
    """Splits at the last ':' where a number follows it, so that `C:/x` and `/a:b` stay whole."""
    name, colon, tail = item.rpartition(":")
    try:
        return (name.strip(), float(tail)) if colon else (item, 1.0)
    except ValueError:
        return item, 1.0
