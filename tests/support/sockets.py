"""The sockets of processes, as Linux tells them."""

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


def tcp_lines(pid: int, state: str) -> list[tuple[str, str]]:
    """The local and the remote address of a process's own TCP sockets in a state."""
    own, found = descriptors(pid), []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, found_state, *_, inode = line.split()[:10]
            if found_state == state and inode in own:
                found.append((local, remote))
    return found


def descriptors(pid: int | str) -> dict[str, int]:
    """A process's descriptors of sockets by inode."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime
            name = os.readlink(entry)
            if name.startswith("socket:"):
                found[name[8:-1]] = int(entry.name)
    return found


def listeners(pid: int) -> list[Listener]:
    """Every TCP socket of the process that listens."""
    places = [local.partition(":") for local, _ in tcp_lines(pid, _LISTENING)]
    return [Listener(_address(address), int(port, 16)) for address, _, port in places]


def _address(text: str) -> str:
    """Of the kernel's words of 32 bits, each in the machine's own order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return str(ipaddress.ip_address(socket.inet_ntop(family, packed)))
