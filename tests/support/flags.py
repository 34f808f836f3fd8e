"""Flags of dist_clm_train.py, parsed from a text as a user types it."""

from typing import Any


def flags_of(line: str) -> dict[str, Any]:
    """Returns name -> value for a text like `--lr 1e-3 --bf16`; a flag without a value is true."""
    flags: dict[str, Any] = {}
    for part in f" {' '.join(line.split())}".split(" --")[1:]:
        name, _, value = part.partition(" ")
        flags[name] = value or "true"
    return flags
