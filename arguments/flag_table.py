"""The table of all flags of dist_clm_train.py, grouped by the headings of --help.

Each flag has a rule for a run that resumes with another value, and a rule for ranks with different
values. A new flag needs an entry in a file of arguments/flags/, a field in a class of
`arguments.settings`, and the code that uses the value.
"""

from typing import Any

from arguments.flag import Flag
from arguments.flags.data import DATA_FLAGS
from arguments.flags.output import CHECKPOINT_FLAGS, OUTPUT_FLAGS
from arguments.flags.processes import NETWORK_FLAGS, PARALLEL_FLAGS
from arguments.flags.training import MODEL_FLAGS, PRECISION_FLAGS, UPDATE_FLAGS
from arguments.settings import Settings

FLAGS_BY_HEADING: dict[str, tuple[Flag, ...]] = {
    "model": MODEL_FLAGS,
    "processes": PARALLEL_FLAGS,
    "network": NETWORK_FLAGS,
    "data": DATA_FLAGS,
    "updates": UPDATE_FLAGS,
    "precision and memory": PRECISION_FLAGS,
    "checkpoints": CHECKPOINT_FLAGS,
    "checks and reports": OUTPUT_FLAGS,
}

FLAGS: tuple[Flag, ...] = tuple(flag for flags in FLAGS_BY_HEADING.values() for flag in flags)


def fixed_flags(settings: Settings) -> dict[str, Any]:
    """Returns the values that a resumed run must not change, by the name that an error prints."""
    replicas, update = settings.parallel.data_group_size, settings.update
    return {
        **_kept(settings, "must match"),
        "the global batch (--batch-size x --data-group-size)": update.batch_size * replicas,
        "the precision": settings.precision.precision,
    }


def fixed_defaults() -> dict[str, Any]:
    """Returns the defaults of the flags that must not change; old checkpoints lack new flags."""
    return {flag.name: flag.default for flag in FLAGS if flag.resume == "must match"}


def free_flags(settings: Settings) -> dict[str, Any]:
    """Returns the values that a resumed run may change, by the name of the flag."""
    return _kept(settings, "may change")


def flags_of_all_ranks(settings: Settings) -> dict[str, str | int | float | bool | None]:
    """Returns flag values that must be the same on all ranks, by the name that an error prints."""
    values = settings.values()
    shared: dict[str, str | int | float | bool | None] = {
        "giving --evaluation-data": settings.data.evaluation_data is not None
    }
    for flag in FLAGS:
        if flag.ranks == "same":
            value = values[flag.dest]
            is_plain = value is None or isinstance(value, (bool, int, float))
            shared[flag.name] = value if is_plain else str(value)
    return shared


def _kept(settings: Settings, rule: str) -> dict[str, Any]:
    values = settings.values()
    return {flag.name: values[flag.dest] for flag in FLAGS if flag.resume == rule}
