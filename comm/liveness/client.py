"""The way from a rank to the hub on rank 0: found, reached, and proved on both ends."""

from __future__ import annotations

import socket
from typing import BinaryIO

from torch.distributed import DistError

from comm.liveness.handshake import Handshake
from comm.liveness.protocol import MAX_LINE, decode, encode
from comm.liveness.server import keep_alive
from comm.rendezvous.join import Rendezvous


def open_link(rendezvous: Rendezvous, *, master: str) -> tuple[socket.socket, BinaryIO]:
    """The connection, and the lines that come over it; `master` is rank 0, for messages.

    Raises:
        ConnectionError: rank 0 has gone, cannot be reached at its interface's address, or is
            another there.
    """
    assert rendezvous.sealed is not None
    assert rendezvous.watchdog is not None
    host = rendezvous.roster[0].host
    try:
        address, port = rendezvous.sealed.get("watch").split()
    except DistError as error:
        raise ConnectionError(f"{master} is gone: {error}") from error
    seconds = max(rendezvous.watchdog.left, 1.0)
    try:
        link = socket.create_connection((address, int(port)), timeout=seconds)
    except OSError as error:
        raise ConnectionError(
            f"cannot reach rank 0 (host {host}) at {address} port {port} over "
            f"{rendezvous.roster[rendezvous.rank].interface}: {error.strerror or error}; is "
            "--net-interface right on rank 0, and does a firewall let the port through?"
        ) from error
    lines = link.makefile("rb")
    try:
        _greet(Handshake(rendezvous.key, rendezvous.nonce), rendezvous.rank, link, lines)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"what listens at {address} port {port} does not prove to be rank 0 (host {host}) of "
            f"this job: {error}"
        ) from error
    link.settimeout(None)
    keep_alive(link)
    return link, lines


def _greet(greeting: Handshake, rank: int, link: socket.socket, lines: BinaryIO) -> None:
    """Proves this rank to rank 0, and has it prove itself."""
    challenge = decode(lines.readline(MAX_LINE)).get("challenge")
    reply = greeting.reply(challenge, rank=rank)
    link.sendall(encode(reply))
    answer = decode(lines.readline(MAX_LINE))
    if not greeting.is_answer(answer, challenge=challenge, reply=reply):
        raise ValueError("it does not know this job's key")
