"""Which sockets of a process listen, as Linux tells it."""

import contextlib
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

_LISTENING = "0A"  # TCP_LISTEN


class Listener(NamedTuple):
    """Where a socket listens."""

    address: str
    port: int


def listeners(pid: int) -> list[Listener]:
    """Every TCP socket of the process that listens."""
    mine = _inodes(pid)
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTENING and rest[5] in mine:
                address, _, port = local.partition(":")
                found.append(Listener(_address(address), int(port, 16)))
    return found


def _inodes(pid: int) -> set[str]:
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            name = os.readlink(entry)
            if name.startswith("socket:["):
                found.add(name[8:-1])
    return found


def _address(text: str) -> str:
    """Of the kernel's words of 32 bits, each in the machine's own order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return str(ipaddress.ip_address(socket.inet_ntop(family, packed)))
