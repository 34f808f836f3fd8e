"""What modules keep from call to call, beside their weights."""

from __future__ import annotations

from modules.rotary import rotation
from modules.short_attention import future


def forget_tables() -> None:
    """Drops all tables; they are made anew where they are needed."""
    rotation.cache_clear()
    future.cache_clear()
