"""The flag --evaluation-data: held-out sources with names. The module imports no torch."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from common.text import shown
from tasks.registry import SUFFIXES, check_source
from tasks.source_spec import SourceSpec

EVALUATION_FLAG = "--evaluation-data"


@dataclass(frozen=True)
class EvaluationSet:
    """A source of held-out text, and a printable name that logs and metrics show.

    The name is empty if this is the only set and the user gave no name.
    """

    name: str
    source: str


def parse_evaluation_data(value: str) -> list[EvaluationSet]:
    """Parses `[name=]source,[name=]source,...`; ignores white space around items and names.

    An item without `name=` is named after its file (without the suffix), folder or task; if it is
    the only item, its name is empty. A value that is an existing path is not split at ",", and an
    item that is an existing path is not split at "=". Raises ValueError if an item, a name or a
    source is empty, a source has a weight, or two names are the same.
    """
    if os.path.exists(value):
        return [EvaluationSet("", value)]
    items = [_parse_item(item.strip(), value) for item in value.split(",")]
    if len(items) == 1 and items[0][0] is None:
        return [EvaluationSet("", items[0][1])]
    sets = [
        EvaluationSet(shown(_default_name(source) if name is None else name), source)
        for name, source in items
    ]
    _check_names(sets)
    return sets


def check_evaluation_data(value: str) -> None:
    """Checks the flag's value and the sources; reads no document.

    Raises ValueError like `parse_evaluation_data` and `tasks.registry.check_source`.
    """
    for evaluation_set in parse_evaluation_data(value):
        check_source(SourceSpec(evaluation_set.source), flag=EVALUATION_FLAG)


def _parse_item(item: str, value: str) -> tuple[str | None, str]:
    name, source = _split_name(item)
    if name == "" or not source:
        problem = "an item is empty" if not item else "a name or a source is empty"
        raise ValueError(
            f"{EVALUATION_FLAG} '{shown(value)}': {problem}, expected [name=]source,..."
        )
    if _has_weight(source):
        raise ValueError(
            f"{EVALUATION_FLAG} {shown(item)}: there is no such path, and an evaluation set takes "
            "no weight: expected [name=]source"
        )
    return name, source


def _split_name(item: str) -> tuple[str | None, str]:
    """Splits an item at the first '='; a path such as `/data/lang=en/a.jsonl` is not split.

    Returns the name (None if the item has no name) and the source.
    """
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


def _default_name(source: str) -> str:
    base = os.path.basename(os.path.abspath(source))
    suffix = next((suffix for suffix in SUFFIXES if base.endswith(suffix)), "")
    return base.removesuffix(suffix) or base or source


def _check_names(sets: Sequence[EvaluationSet]) -> None:
    sources: dict[str, str] = {}
    for item in sets:
        if item.name in sources:
            raise ValueError(
                f"{EVALUATION_FLAG}: {shown(sources[item.name])} and {shown(item.source)} are both "
                f"named {item.name}: expected name=source with a different name for each"
            )
        sources[item.name] = item.source
