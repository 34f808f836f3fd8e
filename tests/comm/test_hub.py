"""The hub takes only ranks of this run, whatever else comes in."""

from __future__ import annotations

import contextlib
import queue
import socket
from collections.abc import Iterator

import pytest

from comm.liveness.handshake import Handshake
from comm.liveness.protocol import Message, decode, encode
from comm.liveness.server import LivenessServer
from comm.rendezvous.job_key import JobKey

GREETING = Handshake(JobKey("a job"), "6e6f6e6365")
OTHER_JOB = Handshake(JobKey("another"), GREETING.nonce)
OLDER_START = Handshake(GREETING.key, "0123")


class Link:
    """A rank's, or a stranger's, end of a connection."""

    def __init__(self, hub: LivenessServer) -> None:
        self._socket = socket.create_connection(("127.0.0.1", hub.port), timeout=5.0)
        self._lines = self._socket.makefile("rb")
        self.challenge = decode(self._lines.readline())["challenge"]

    def greet(self, rank: int, greeting: Handshake = GREETING) -> Link:
        """Does what a rank of `greeting`'s start does."""
        self.reply = greeting.reply(self.challenge, rank=rank)
        return self.send(encode(self.reply))

    def enter(self, rank: int) -> Link:
        """As `greet`; the hub proves itself."""
        answer = decode(self.greet(rank).read())
        assert GREETING.is_answer(answer, challenge=self.challenge, reply=self.reply)
        return self

    def send(self, data: bytes) -> Link:
        self._socket.sendall(data)
        return self

    def read(self) -> bytes:
        """The next line; empty where the hub has closed the connection."""
        try:
            return self._lines.readline()
        except ConnectionResetError:
            return b""

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def events() -> queue.Queue[Message]:
    return queue.Queue()


@pytest.fixture
def hub(events: queue.Queue[Message]) -> Iterator[LivenessServer]:
    hub = LivenessServer(address="127.0.0.1", greeting=GREETING, world_size=3, on_event=events.put)
    yield hub
    hub.close()


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
    hub: LivenessServer, events: queue.Queue[Message], data: bytes
) -> None:
    stranger = Link(hub)
    with contextlib.suppress(ConnectionError):  # dropped before it had said all
        stranger.send(data)
    assert stranger.read() == b""
    ranks = [Link(hub).enter(rank) for rank in (1, 2)]
    assert hub.await_all(seconds=5.0) == []
    assert events.empty()
    for rank in ranks:
        rank.send(encode({"bye": True})).close()


@pytest.mark.parametrize("rank", [-1, 0, 3])
def test_a_rank_that_the_run_has_not_is_dropped(hub: LivenessServer, rank: int) -> None:
    assert Link(hub).greet(rank).read() == b""


@pytest.mark.parametrize("greeting", [OTHER_JOB, OLDER_START])
def test_a_rank_of_another_job_or_start_is_dropped(
    hub: LivenessServer, events: queue.Queue[Message], greeting: Handshake
) -> None:
    assert Link(hub).greet(1, greeting).read() == b""
    assert hub.await_all(seconds=0.1) == [1, 2]
    assert events.empty()


def test_what_a_rank_said_once_is_of_no_use_again(hub: LivenessServer) -> None:
    """Nor is it to a rank that would pass for another."""
    first = Link(hub).enter(1)
    played_back = Link(hub).send(encode(first.reply))
    assert played_back.read() == b""
    other = Link(hub)
    reply = GREETING.reply(other.challenge, rank=1)
    assert other.send(encode({**reply, "rank": 2})).read() == b""


def test_strangers_that_hang_on_keep_no_rank_out(
    hub: LivenessServer, events: queue.Queue[Message]
) -> None:
    """Of any number the hub keeps 64, beside as many as the run has ranks, who are strangers until
    they have proved themselves; the first to go is the one that has been there longest."""
    strangers = [Link(hub).send(b'{"rank": 1, "chal') for _ in range(70)]
    assert [stranger.read() for stranger in strangers[:3]] == [b"", b"", b""]
    ranks = [Link(hub).enter(rank) for rank in (1, 2)]
    assert hub.await_all(seconds=5.0) == []
    assert events.empty()
    for link in (*strangers, *ranks):
        link.close()


def test_a_second_connection_of_a_rank_is_dropped(
    hub: LivenessServer, events: queue.Queue[Message]
) -> None:
    first = Link(hub).enter(1)
    assert hub.await_all(seconds=0.5) == [2]
    assert Link(hub).greet(1).read() == b""
    assert events.empty()
    first.close()
    assert events.get(timeout=5.0) == {"lost": 1}


def test_only_the_first_failure_is_told(hub: LivenessServer, events: queue.Queue[Message]) -> None:
    one, two = (Link(hub).enter(rank) for rank in (1, 2))
    assert hub.await_all(seconds=5.0) == []
    one.send(encode({"failed": 2, "line": "the cause"}))
    assert decode(two.read()) == {"failed": 2, "line": "the cause", "rank": 1}
    two.close()
    one.close()
    hub.await_goodbyes(seconds=5.0)
    assert events.get(timeout=5.0)["line"] == "the cause"
    assert events.empty()
