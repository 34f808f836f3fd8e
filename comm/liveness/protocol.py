"""Messages of the liveness connections: one JSON object per line."""

import json
import socket
from collections.abc import Mapping
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]

MAX_LINE = 64 * 1024  # bytes
_MAX_TEXT = 8000  # characters of one value


def encode(message: Message) -> bytes:
    """Returns the message as one line; cuts long texts so that the line fits in MAX_LINE."""
    short = {k: v[:_MAX_TEXT] if isinstance(v, str) else v for k, v in message.items()}
    return json.dumps(short).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """Returns the message of one line; raises ValueError if the line is not a JSON object."""
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("a message must be a JSON object")
    return message


def set_keep_alive(connection: socket.socket) -> None:
    """Turns on TCP keep-alive, which detects a cut network in 30 seconds instead of two hours."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
