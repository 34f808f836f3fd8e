"""What modules keep from call to call, beside their weights."""

from __future__ import annotations

from modules.attention.cpu import future
from modules.layers.rotary import rotation


def forget_tables() -> None:
    """Drops all tables; they are made anew where they are needed."""
    rotation.cache_clear()
    future.cache_clear()
