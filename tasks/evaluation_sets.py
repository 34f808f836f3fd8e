"""What --evaluation-data may say, read with the standard library alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from common.text import shown
from tasks.registry import SUFFIXES, check_source
from tasks.source_spec import SourceSpec

EVALUATION_FLAG = "--evaluation-data"


@dataclass(frozen=True)
class EvaluationSet:
    """A source of held-out text, and the name that its loss is told by, fit to stand in a line.

    The name is empty where there is this one set alone, and no name was given.
    """

    name: str
    source: str


def parse_evaluation_data(value: str) -> list[EvaluationSet]:
    """Reads `[name=]source,[name=]source,...`; white space around items and names goes.

    A set without a name has that of its file without the suffix, its folder or its task. What is
    a path as it stands is never cut, whatever it holds.

    Raises:
        ValueError: An item or a name is empty, a source has a weight, or two names are the same.
    """
    if os.path.exists(value):
        return [EvaluationSet("", value)]
    items = [_parse_item(item.strip(), value) for item in value.split(",")]
    if len(items) == 1 and items[0][0] is None:
        return [EvaluationSet("", items[0][1])]
    sets = [
        EvaluationSet(shown(_name_of(source) if name is None else name), source)
        for name, source in items
    ]
    _check_names(sets)
    return sets


def check_evaluation_data(value: str) -> None:
    """Says early what opening the sources would: reads no document.

    Raises:
        ValueError: As `parse_evaluation_data`, or as `tasks.registry.check_source` for a source.
    """
    for one in parse_evaluation_data(value):
        check_source(SourceSpec(one.source), flag=EVALUATION_FLAG)


def _parse_item(item: str, value: str) -> tuple[str | None, str]:
    name, source = _split_name(item)
    if name == "" or not source:
        what = "an item is empty" if not item else "a name or a source is empty"
        raise ValueError(f"{EVALUATION_FLAG} '{shown(value)}': {what}, expected [name=]source,...")
    if _has_weight(source):
        raise ValueError(
            f"{EVALUATION_FLAG} {shown(item)}: there is no such path, and an evaluation set takes "
            "no weight: expected [name=]source"
        )
    return name, source


def _split_name(item: str) -> tuple[str | None, str]:
    """The first '=' ends a name unless it is a path's, as in `/data/lang=en/a.jsonl`."""
    name, equals, source = item.partition("=")
    if not equals or "/" in name or os.path.exists(item):
        return None, item
    return name.strip(), source.strip()


def _has_weight(source: str) -> bool:
    _, colon, tail = source.rpartition(":")
    try:
        float(tail)
    except ValueError:
        return False
    return bool(colon) and not os.path.exists(source)


def _name_of(source: str) -> str:
    base = os.path.basename(os.path.abspath(source))
    suffix = next((one for one in SUFFIXES if base.endswith(one)), "")
    return base.removesuffix(suffix) or base or source


def _check_names(sets: Sequence[EvaluationSet]) -> None:
    first: dict[str, str] = {}
    for one in sets:
        if one.name in first:
            raise ValueError(
                f"{EVALUATION_FLAG}: {shown(first[one.name])} and {shown(one.source)} are both "
                f"named {one.name}: expected name=source with a name of its own for each"
            )
        first[one.name] = one.source
