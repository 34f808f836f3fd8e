"""Names of files and what they hold, in messages of one line."""

from __future__ import annotations


def shown(value: str) -> str:
    """`value` as it may stand in a message of one line."""
    return value if value.isprintable() else ascii(value)
