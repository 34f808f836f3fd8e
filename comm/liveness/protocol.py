"""Messages of the liveness connection: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]


MAX_LINE = 64 * 1024


def encode(message: Message) -> bytes:
    """One line; long texts are cut so that it stays within MAX_LINE."""
    short = {k: v[:8000] if isinstance(v, str) else v for k, v in message.items()}
    return json.dumps(short).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message of one line.

    Raises:
        ValueError: `line` is not a JSON object.
    """
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("a message must be a JSON object")
    return message
