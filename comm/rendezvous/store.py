"""The key-value store at --dist-url; the master (rank 0 or torchrun's agent) hosts the store."""

import errno
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from comm.lifecycle.deadline import Deadline
from comm.rendezvous.dist_url import parse_dist_url, resolve

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.25
_PROBE_SECONDS = 5.0


def host_store(url: str, *, address: str, deadline: Deadline) -> TCPStore:
    """Hosts the store on this machine; it listens at one address only.

    Args:
        address: this machine's address; the store listens there, and not at the address of `url`,
            in the two cases that `_resolve` describes.

    Raises:
        ValueError: the port is in use, or the address does not belong to this machine.
    """
    host, port = parse_dist_url(url)
    family, bound = _resolve(host, address)
    listener = _listen(url, family, bound, port)
    if host not in (bound, "localhost") and ipaddress.ip_address(bound).is_loopback:
        logger.warning(
            "--dist-url %s: %s is a loopback address here, so that no other machine can join: is "
            "--net-interface right on rank 0?",
            url,
            host,
        )
    return TCPStore(
        bound,
        port,
        is_master=True,
        timeout=timedelta(seconds=deadline.seconds),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def connect_to_store(
    url: str, *, address: str, deadline: Deadline, on_retry: Callable[[], None]
) -> TCPStore:
    """Connects to the master's store; tries again until the deadline.

    The first attempts are plain TCP connections, because torch's client writes a stack trace for
    each failed attempt.

    Args:
        address: as for `host_store`.
        on_retry: a function to call between two attempts.

    Raises:
        ValueError: no master answers in time; the text names --dist-url and the reason.
    """
    host, port = parse_dist_url(url)
    _, host = _resolve(host, address)
    _await_listener(url, host, port, deadline, on_retry)
    line = (
        f"--dist-url {url}: something accepts connections there but does not answer as the "
        f"master of a run ({deadline.seconds:g} s, --join-timeout); does another program use it?"
    )
    deadline.expect(status=2, line=line)
    try:
        timeout = timedelta(seconds=max(deadline.remaining, 1.0))
        return TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)
    except DistError:
        raise ValueError(line) from None


def _await_listener(
    url: str, host: str, port: int, deadline: Deadline, on_retry: Callable[[], None]
) -> None:
    while True:
        try:
            seconds = min(_PROBE_SECONDS, max(deadline.remaining, 0.1))
            socket.create_connection((host, port), timeout=seconds).close()
            return
        except OSError as error:
            if deadline.remaining <= 0:
                raise ValueError(
                    f"--dist-url {url}: no answer within {deadline.seconds:g} s (--join-timeout): "
                    f"{error.strerror or error}; is rank 0 running there, and does a firewall let "
                    "this port through?"
                ) from None
        on_retry()
        time.sleep(_RETRY_SECONDS)


def _resolve(host: str, address: str) -> tuple[socket.AddressFamily, str]:
    """Returns the address family and the address of the store.

    This is the address of `host`, but in two cases it is this machine's `address`: if `host` is an
    unspecified address such as 0.0.0.0, or if `host` is a name, other than localhost, that has a
    loopback address. /etc/hosts often gives a machine's own name such an address, which other
    machines cannot reach.
    """
    family, resolved = resolve(host)
    ip = ipaddress.ip_address(resolved)
    is_own_name = ip.is_loopback and host not in (resolved, "localhost")
    return resolve(address) if is_own_name or ip.is_unspecified else (family, resolved)


def _listen(url: str, family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    try:
        return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        raise ValueError(f"--dist-url {url}: {_bind_problem(error, address, port)}") from None


def _bind_problem(error: OSError, address: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {port} is in use on this machine; another run (or another rank 0) may hold it: "
            "end it or choose another port on all ranks"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return (
            f"no interface of this machine holds {address}; rank 0 must run on the machine that "
            "--dist-url names"
        )
    return f"cannot listen there: {os.strerror(error.errno or 0)}"
