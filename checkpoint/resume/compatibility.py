"""Whether a run continues the one that its checkpoint was made by, and what has changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from checkpoint.steps.meta import StepMeta
from common.files import read_json_object


def check_same_run(meta: StepMeta, flags: Mapping[str, Any]) -> None:
    """ValueError names the flag and both values where a flag that may not change has changed."""
    for flag, value in flags.items():
        if meta.flags.get(flag) != value:
            raise ValueError(
                f"{flag} is {value}, but the checkpoint of step {meta.step} was made with "
                f"{meta.flags.get(flag)}"
            )


def check_same_config(folder: Path, model_folder: Path) -> None:
    """ValueError names the field and both values where the two config.json differ."""
    kept = read_json_object(folder / "config.json")
    now = read_json_object(model_folder / "config.json")
    for key in sorted(kept.keys() | now.keys()):
        if kept.get(key) != now.get(key):
            raise ValueError(
                f"--model-name {model_folder}: {key} is {now.get(key)!r}, but the checkpoint "
                f"{folder} was made with {kept.get(key)!r}"
            )


def changes(
    kept: Mapping[str, Any], settings: Mapping[str, Any], *, idle: Collection[str] = ()
) -> list[str]:
    """One line for each setting that is not what the checkpoint was made with, `kept`.

    `idle` are flags that do nothing in this run, whatever they are now.
    """
    return [
        f"{flag} is now {_shown(value)}, it was {_shown(kept.get(flag))}"
        + (", which has no effect here" if flag in idle else "")
        for flag, value in settings.items()
        if kept.get(flag) != value
    ]


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)
