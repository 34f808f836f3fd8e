"""Two simulated machines: network namespaces with addresses, and a virtual wire that joins them."""

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


@dataclass(frozen=True)
class Host:
    """A simulated machine: its name (also the namespace's name), interface and address."""

    name: str
    interface: str
    address: str


HOSTS = (
    Host(f"near-{os.getpid()}", "wan0", "10.77.0.1"),
    Host(f"far-{os.getpid()}", "eth-lab", "10.77.0.2"),
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


def make_wire() -> None:
    for host in HOSTS:
        ip("netns", "add", host.name)
    near, far = HOSTS
    ends = ("link", "add", near.interface, "netns", near.name, "type", "veth", "peer", "name")
    ip(*ends, far.interface, "netns", far.name)
    for host in HOSTS:
        ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", host.interface)
        for interface in ("lo", host.interface):
            ip("-n", host.name, "link", "set", interface, "up")


@contextmanager
def wired() -> Iterator[None]:
    """Creates the two hosts for the `with` block; skips the test if they cannot be created."""
    import pytest  # here, because checks for a GPU run ranks on machines without pytest

    if shutil.which("ip") is None:
        pytest.skip("needs the command ip (Debian's package iproute2)")
    try:
        make_wire()
        yield
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot create network namespaces here: {error.stderr.strip()}")
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True, check=False)


def plug(host: Host, *, up: bool) -> None:
    """Restores the wire at a host if `up`, else cuts it; a cut closes no connection."""
    ip("-n", host.name, "link", "set", host.interface, "up" if up else "down")


def enter_host(name: str) -> None:
    """Moves this process to the network of a host, and sets the host name for this process only."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/var/run/netns", name).open("rb") as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS):
            raise OSError(ctypes.get_errno(), f"cannot move to the namespace {name}")
    socket.sethostname(name)
