"""Tests that the liveness server accepts only ranks of this run."""

import contextlib
import queue
import socket
from collections.abc import Iterator

import pytest

from comm.liveness.handshake import Handshake
from comm.liveness.protocol import Message, decode, encode
from comm.liveness.server import LivenessServer
from comm.rendezvous.job_key import JobKey

HANDSHAKE = Handshake(JobKey("a job"), "6e6f6e6365")
OTHER_JOB = Handshake(JobKey("another"), HANDSHAKE.nonce)
OLDER_START = Handshake(HANDSHAKE.key, "0123")


class Connection:
    """Connection that a rank or a foreign client opens to the liveness server."""

    def __init__(self, server: LivenessServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", server.port), timeout=5.0)
        self._lines = self._socket.makefile("rb")
        self.challenge = decode(self._lines.readline())["challenge"]

    def shake_hands(self, rank: int, handshake: Handshake = HANDSHAKE) -> "Connection":
        """Answers the server's challenge as `rank`, with the key and the nonce of `handshake`."""
        self.reply = handshake.reply(self.challenge, rank=rank)
        return self.send(encode(self.reply))

    def enter(self, rank: int) -> "Connection":
        """Does the handshake as `rank`; checks the proof that the server belongs to this run."""
        answer = decode(self.shake_hands(rank).read())
        assert HANDSHAKE.is_answer(answer, challenge=self.challenge, reply=self.reply)
        return self

    def send(self, data: bytes) -> "Connection":
        self._socket.sendall(data)
        return self

    def read(self) -> bytes:
        """Returns the next line, or empty bytes if the server has closed the connection."""
        try:
            return self._lines.readline()
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def messages() -> queue.Queue[Message]:
    return queue.Queue()


@pytest.fixture
def server(messages: queue.Queue[Message]) -> Iterator[LivenessServer]:
    server = LivenessServer(
        address="127.0.0.1", handshake=HANDSHAKE, world_size=3, on_message=messages.put
    )
    yield server
    server.close()


@pytest.mark.parametrize(
    "data",
    [
        b'{"rank": 1, "challenge": "00", "proof": null}\n',
        b'{"rank": 1, "proof": "00"}\n',
        b'{"rank": [1], "challenge": "00", "proof": "00"}\n',
        b'{"nonce": "6e6f6e6365", "rank": 1}\n',
        b'{"failed": 2, "line": "no hello"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 60_000 + b"\n",
        b"[1]\n",
        b"\x80\x04\x95pickle\n",
        b"x" * 300_000,
    ],
)
def test_strangers_are_dropped(
    server: LivenessServer, messages: queue.Queue[Message], data: bytes
) -> None:
    stranger = Connection(server)
    with contextlib.suppress(ConnectionError):  # dropped before all data was sent
        stranger.send(data)
    assert stranger.read() == b""
    ranks = [Connection(server).enter(rank) for rank in (1, 2)]
    assert server.await_all(seconds=5.0) == []
    assert messages.empty()
    for rank in ranks:
        rank.send(encode({"bye": True})).close()


@pytest.mark.parametrize("rank", [-1, 0, 3])
def test_a_rank_that_the_run_has_not_is_dropped(server: LivenessServer, rank: int) -> None:
    assert Connection(server).shake_hands(rank).read() == b""


@pytest.mark.parametrize("handshake", [OTHER_JOB, OLDER_START])
def test_a_rank_of_another_job_or_start_is_dropped(
    server: LivenessServer, messages: queue.Queue[Message], handshake: Handshake
) -> None:
    assert Connection(server).shake_hands(1, handshake).read() == b""
    assert server.await_all(seconds=0.1) == [1, 2]
    assert messages.empty()


def test_what_a_rank_said_once_is_of_no_use_again(server: LivenessServer) -> None:
    """The server refuses a reply copied from another connection or changed to another rank."""
    first = Connection(server).enter(1)
    played_back = Connection(server).send(encode(first.reply))
    assert played_back.read() == b""
    other = Connection(server)
    reply = HANDSHAKE.reply(other.challenge, rank=1)
    assert other.send(encode({**reply, "rank": 2})).read() == b""


def test_strangers_that_hang_on_keep_no_rank_out(
    server: LivenessServer, messages: queue.Queue[Message]
) -> None:
    """Connections that do not finish the handshake do not block a rank's connection.

    The server keeps at most 64 such connections plus one for each rank; it drops the oldest first.
    """
    strangers = [Connection(server).send(b'{"rank": 1, "chal') for _ in range(70)]
    assert [stranger.read() for stranger in strangers[:3]] == [b"", b"", b""]
    ranks = [Connection(server).enter(rank) for rank in (1, 2)]
    assert server.await_all(seconds=5.0) == []
    assert messages.empty()
    for connection in (*strangers, *ranks):
        connection.close()


def test_a_second_connection_of_a_rank_is_dropped(
    server: LivenessServer, messages: queue.Queue[Message]
) -> None:
    first = Connection(server).enter(1)
    assert server.await_all(seconds=0.5) == [2]
    assert Connection(server).shake_hands(1).read() == b""
    assert messages.empty()
    first.close()
    assert messages.get(timeout=5.0) == {"lost": 1}


def test_only_the_first_failure_is_told(
    server: LivenessServer, messages: queue.Queue[Message]
) -> None:
    one, two = (Connection(server).enter(rank) for rank in (1, 2))
    assert server.await_all(seconds=5.0) == []
    one.send(encode({"failed": 2, "line": "the cause"}))
    assert decode(two.read()) == {"failed": 2, "line": "the cause", "rank": 1}
    two.close()
    one.close()
    server.await_departures(seconds=5.0)
    assert messages.get(timeout=5.0)["line"] == "the cause"
    assert messages.empty()
