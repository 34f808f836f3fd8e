"""A rank's connection to rank 0's liveness server; both sides prove that they know the job key."""

import socket
from typing import BinaryIO

from torch.distributed import DistError

from comm.liveness.handshake import Handshake
from comm.liveness.protocol import MAX_LINE, decode, encode, set_keep_alive
from comm.rendezvous.join import Rendezvous
from comm.rendezvous.signed_store import LIVENESS_ADDRESS


def connect_to_server(rendezvous: Rendezvous, *, master: str) -> tuple[socket.socket, BinaryIO]:
    """Returns a connection to rank 0, and a file that reads lines from the connection.

    `master` is rank 0's name in errors. Raises ConnectionError if rank 0 has ended, if its address
    cannot be reached, or if another program listens at this address.
    """
    assert rendezvous.store is not None
    assert rendezvous.deadline is not None
    host = rendezvous.participants[0].host
    try:
        address, port = rendezvous.store.get(LIVENESS_ADDRESS).split()
    except DistError as error:
        raise ConnectionError(f"{master} is gone: {error}") from error
    seconds = max(rendezvous.deadline.remaining, 1.0)
    try:
        connection = socket.create_connection((address, int(port)), timeout=seconds)
    except OSError as error:
        raise ConnectionError(
            f"cannot reach rank 0 (host {host}) at {address} port {port} over "
            f"{rendezvous.participants[rendezvous.rank].interface}: {error.strerror or error}; is "
            "--net-interface right on rank 0, and does a firewall let the port through?"
        ) from error
    lines = connection.makefile("rb")
    try:
        _shake_hands(rendezvous, connection, lines)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"the listener at {address} port {port} does not prove to be rank 0 (host {host}) of "
            f"this job: {error}"
        ) from error
    connection.settimeout(None)
    set_keep_alive(connection)
    return connection, lines


def _shake_hands(rendezvous: Rendezvous, connection: socket.socket, lines: BinaryIO) -> None:
    """Proves that this rank knows the job key; raises ValueError if rank 0 does not know it."""
    handshake = Handshake(rendezvous.key, rendezvous.nonce)
    challenge = decode(lines.readline(MAX_LINE)).get("challenge")
    reply = handshake.reply(challenge, rank=rendezvous.rank)
    connection.sendall(encode(reply))
    answer = decode(lines.readline(MAX_LINE))
    if not handshake.is_answer(answer, challenge=challenge, reply=reply):
        raise ValueError("it does not know this job's key")
