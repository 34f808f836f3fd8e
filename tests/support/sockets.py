"""Sockets of processes, from Linux's /proc."""

import contextlib
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

_LISTENING = "0A"  # TCP_LISTEN


class Listener(NamedTuple):
    """Address and port on which a socket listens."""

    address: str
    port: int


def tcp_lines(pid: int, state: str) -> list[tuple[str, str]]:
    """Returns local and remote address of each TCP socket in `state` that process `pid` has."""
    own, found = descriptors(pid), []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, remote, found_state, *_, inode = line.split()[:10]
            if found_state == state and inode in own:
                found.append((local, remote))
    return found


def descriptors(pid: int | str) -> dict[str, int]:
    """Returns the file descriptors of a process's sockets; the keys are the sockets' inodes."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # already closed
            name = os.readlink(entry)
            if name.startswith("socket:"):
                found[name[8:-1]] = int(entry.name)
    return found


def listeners(pid: int) -> list[Listener]:
    """Returns every listening TCP socket of the process."""
    places = [local.partition(":") for local, _ in tcp_lines(pid, _LISTENING)]
    return [Listener(_address(address), int(port, 16)) for address, _, port in places]


def _address(text: str) -> str:
    """Decodes an IP address, given as hexadecimal 32-bit words in the machine's byte order."""
    words = [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return str(ipaddress.ip_address(socket.inet_ntop(family, packed)))
