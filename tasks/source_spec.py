"""Parses --task-name: sources and their weights. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from common.text import shown

TASK_FLAG = "--task-name"


@dataclass(frozen=True)
class SourceLocation:
    """Where a source's documents are: a file or folder of a kind, or a name on the hub.

    task: of a layout of its own, which the task's module opens. missing: what is not there, where
    the hub takes its place.
    """

    path: str
    kind: Literal["files", "saved", "hub", "task"]
    missing: str = ""


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
