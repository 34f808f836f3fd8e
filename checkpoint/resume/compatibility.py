"""Comparison of a run's flags and config with the checkpoint from which the run resumes."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from checkpoint.steps.meta import StepMeta
from common.files import read_json_object


def check_same_run(
    meta: StepMeta, flags: Mapping[str, Any], *, defaults: Mapping[str, Any]
) -> None:
    """Raises ValueError if a flag in `flags` has another value in the checkpoint.

    The text of the error names the flag and both values.

    Args:
        flags: the flags that must not change when a run resumes, with their values in this run.
        defaults: the default of each flag. A checkpoint that lacks a flag is older than the flag;
            its run behaved as with the default.
    """
    for flag, value in flags.items():
        if (saved := meta.flags.get(flag, defaults.get(flag))) != value:
            raise ValueError(
                f"{flag} is {value}, but the checkpoint of step {meta.step} was made with {saved}"
            )


def check_same_config(folder: Path, model_folder: Path) -> None:
    """Raises ValueError if config.json differs between the checkpoint and the model.

    The text names the first field that differs, and both values.
    """
    saved = read_json_object(folder / "config.json")
    now = read_json_object(model_folder / "config.json")
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            raise ValueError(
                f"--model-name {model_folder}: {key} is {now.get(key)!r}, but the checkpoint "
                f"{folder} was made with {saved.get(key)!r}"
            )


def describe_changes(
    saved: Mapping[str, Any], settings: Mapping[str, Any], *, idle: Collection[str] = ()
) -> list[str]:
    """Returns one line for each setting that differs between the checkpoint and the run.

    Args:
        saved: the settings of the checkpoint, by flag.
        settings: the settings of the run, by flag.
        idle: the flags that have no effect in this run.
    """
    return [
        f"{flag} is now {_format(value)}, it was {_format(saved.get(flag))}"
        + ("; this flag has no effect in this run" if flag in idle else "")
        for flag, value in settings.items()
        if saved.get(flag) != value
    ]


def _format(value: object) -> str:
    return "not given" if value is None else str(value)
