"""The hub takes only ranks of this run, whatever else comes in."""

from __future__ import annotations

import contextlib
import queue
import socket
from collections.abc import Iterator

import pytest

from comm.hub import Hub, Message, decode, encode

NONCE = "6e6f6e6365"


class Link:
    """A rank's, or a stranger's, end of a connection."""

    def __init__(self, hub: Hub) -> None:
        self._socket = socket.create_connection(("127.0.0.1", hub.port), timeout=5.0)
        self._lines = self._socket.makefile("rb")

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
def hub(events: queue.Queue[Message]) -> Iterator[Hub]:
    hub = Hub(address="127.0.0.1", nonce=NONCE, world_size=3, on_event=events.put)
    yield hub
    hub.close()


def hello(rank: object, nonce: object = NONCE) -> bytes:
    return encode({"nonce": nonce, "rank": rank})


@pytest.mark.parametrize(
    "data",
    [
        hello(1, "wrong"),
        hello(1, None),
        hello(0),
        hello(3),
        hello("1"),
        b'{"failed": 2, "line": "no hello"}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 60_000 + b"\n",
        b"[1]\n",
        b"\x80\x04\x95pickle\n",
        b"x" * 300_000,
    ],
)
def test_strangers_are_dropped(hub: Hub, events: queue.Queue[Message], data: bytes) -> None:
    stranger = Link(hub)
    with contextlib.suppress(ConnectionError):  # dropped before it had said all
        stranger.send(data)
    assert stranger.read() == b""
    ranks = [Link(hub).send(hello(rank)) for rank in (1, 2)]
    assert hub.await_all(seconds=5.0) == []
    assert events.empty()
    for rank in ranks:
        rank.send(encode({"bye": True})).close()


def test_a_second_connection_of_a_rank_is_dropped(hub: Hub, events: queue.Queue[Message]) -> None:
    first = Link(hub).send(hello(1))
    assert hub.await_all(seconds=0.5) == [2]
    assert Link(hub).send(hello(1)).read() == b""
    assert events.empty()
    first.close()
    assert events.get(timeout=5.0) == {"lost": 1}


def test_only_the_first_failure_is_told(hub: Hub, events: queue.Queue[Message]) -> None:
    one, two = (Link(hub).send(hello(rank)) for rank in (1, 2))
    assert hub.await_all(seconds=5.0) == []
    one.send(encode({"failed": 2, "line": "the cause"}))
    assert decode(two.read()) == {"failed": 2, "line": "the cause", "rank": 1}
    two.close()
    one.close()
    hub.await_goodbyes(seconds=5.0)
    assert events.get(timeout=5.0)["line"] == "the cause"
    assert events.empty()
