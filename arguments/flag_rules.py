"""What the flag table means for a run: what a resume compares, and what all ranks must share."""

from __future__ import annotations

from typing import Any

from arguments.flags.table import FLAGS
from arguments.settings import Settings


def fixed_flags(settings: Settings) -> dict[str, Any]:
    """Returns what a resumed run must share with its checkpoint, by the words of an error."""
    replicas, update = settings.parallel.data_group_size, settings.update
    return {
        **_kept(settings, "must match"),
        "the global batch (--batch-size x --data-group-size)": update.batch_size * replicas,
        "the precision": settings.precision.precision,
    }


def free_flags(settings: Settings) -> dict[str, Any]:
    """Returns what a resumed run may change, by flag."""
    return _kept(settings, "may change")


def flags_of_all_ranks(settings: Settings) -> dict[str, str | int | float | bool | None]:
    """Returns the flags that must be the same on all ranks, as values of JSON."""
    values = settings.values()
    shared: dict[str, str | int | float | bool | None] = {
        "giving --evaluation-data": settings.data.evaluation_data is not None
    }
    for flag in FLAGS:
        if flag.across_ranks == "same":
            value = values[flag.dest]
            is_plain = value is None or isinstance(value, (bool, int, float))
            shared[flag.name] = value if is_plain else str(value)
    return shared


def _kept(settings: Settings, on_resume: str) -> dict[str, Any]:
    values = settings.values()
    return {flag.name: values[flag.dest] for flag in FLAGS if flag.on_resume == on_resume}
