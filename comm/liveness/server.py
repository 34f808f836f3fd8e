"""Rank 0's end of the liveness link: it hears of every failure and tells all ranks.

Messages are JSON objects, one a line. The hub opens with {"challenge"}; a rank answers with
{"rank", "challenge", "proof"}, the hub with {"proof"} (comm.liveness.handshake); then
    to the hub:   {"failed": status, "line"} | {"check": true} | {"alive": true} | {"bye": true}
                  | {"failing": status, "line"}: `failed` follows, with a better line
                  | {"stop": signal}: the rank was asked to, which rank 0 alone is told
    to the ranks: {"lost": rank} | {"silent": rank} | {"failed": status, "line", "rank"}
                  | {"failing": status, "line", "rank"}: the first such
                  | {"check": true} | {"all_alive": true} | {"bye": true}
All ranks are checked from time to time (comm.liveness.heartbeat), and whenever one asks.
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from comm.liveness.handshake import Handshake
from comm.liveness.heartbeat import Heartbeat
from comm.liveness.protocol import MAX_LINE, Message, decode, encode

_MAX_HELLO = 1024  # bytes that a stranger may send
_MAX_STRANGERS = 64  # at once, beside as many as there are ranks; the oldest go first
_HELLO_SECONDS = 10.0
_TICK_SECONDS = 0.2
_SEND_SECONDS = 2.0
PING_SECONDS = 3.0
FAILING_SECONDS = 20.0  # that a rank which is failing may take for its words


class _Peer:
    """One connection; `rank` is None until it has proved to be of this start."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.challenge = secrets.token_hex(16)
        self.rank: int | None = None
        self.opened = time.monotonic()
        self._buffer = b""

    def lines(self) -> list[bytes]:
        """The whole lines that have come in.

        Raises:
            EOFError: the connection ended, or it sends more than a line may hold.
        """
        try:
            data = self.connection.recv(MAX_LINE)
        except OSError as error:
            raise EOFError from error
        most = _MAX_HELLO if self.rank is None else 2 * MAX_LINE
        if not data or len(self._buffer) + len(data) > most:
            raise EOFError
        *whole, self._buffer = (self._buffer + data).split(b"\n")
        return whole

    def tell(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # its end shows when it is read
            self.connection.sendall(line)


class LivenessServer:
    """Listens on `address`, in a thread of its own; tells rank 0 through `on_event`."""

    def __init__(
        self,
        *,
        address: str,
        greeting: Handshake,
        world_size: int,
        on_event: Callable[[Message], None],
    ) -> None:
        self._greeting = greeting
        self._world_size = world_size
        self._on_event = on_event
        self._listener = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: list[_Peer] = []
        self._gone: set[int] = set()
        self._seen: set[int] = set()
        self._event: Message | None = None
        self._failing: tuple[float, Message] | None = None
        self._checked: tuple[float, set[int]] | None = None
        self._pulse = Heartbeat()
        self._changed = threading.Condition()
        self._ending = False
        threading.Thread(target=self._serve, name="watch-hub", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def await_all(self, *, seconds: float) -> list[int]:
        """Waits until all other ranks are connected; returns those that are not by then."""
        everyone = set(range(1, self._world_size))
        self._await(lambda: self._seen == everyone, seconds)
        missing = everyone - self._seen
        self._seen |= missing  # nobody waits for their goodbye
        return sorted(missing)

    def await_goodbyes(self, *, seconds: float) -> None:
        """Waits until every rank has come and gone: a late one must hear of an event too."""
        self._await(
            lambda: len(self._seen) == self._world_size - 1 and not self._present(), seconds
        )

    def event(self, message: Message) -> None:
        """A rank has failed or is lost: the first such event is told to all, rank 0 included."""
        with self._changed:
            if self._ending:
                return
            self._ending = True
            self._event = message
        self.broadcast(message)
        threading.Thread(target=self._on_event, args=(message,), daemon=True).start()

    def failing(self, message: Message) -> None:
        """A rank is failing, and finds words for it: all hear of the first such at once, and that
        it has failed if nothing else is heard of it in time."""
        with self._changed:
            if self._ending or self._failing is not None:
                return
            self._failing = time.monotonic() + FAILING_SECONDS, message
        self.broadcast(message)
        self._on_event(message)

    def broadcast(self, message: Message) -> None:
        line = encode(message)
        for peer in list(self._peers):
            if peer.rank is not None:
                peer.tell(line)

    def check(self) -> None:
        """Asks all ranks whether they are alive; the answer comes as an event or `all_alive`."""
        with self._changed:
            if self._checked is None:
                self._checked = (time.monotonic() + PING_SECONDS, self._present())
                self.broadcast({"check": True})

    def close(self) -> None:
        """Says goodbye to who is still there; later ends of connections are no events."""
        with self._changed:
            self._ending = True
        self.broadcast({"bye": True})

    def _await(self, condition: Callable[[], bool], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(condition, timeout=max(seconds, 0.0))

    def _present(self) -> set[int]:
        return {peer.rank for peer in list(self._peers) if peer.rank is not None}

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(_TICK_SECONDS):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._drop_strangers()
            self._conclude_check()
            self._conclude_failing()
            self._take_pulse()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it may have gone again
            connection, _ = self._listener.accept()
            connection.settimeout(_SEND_SECONDS)
            keep_alive(connection)
            peer = _Peer(connection)
            self._peers.append(peer)
            self._selector.register(connection, selectors.EVENT_READ, peer)
            peer.tell(encode({"challenge": peer.challenge}))

    def _read(self, peer: _Peer) -> None:
        try:
            for line in peer.lines():
                self._handle(peer, decode(line))
                if peer.rank is not None:
                    self._pulse.heard(peer.rank)
        except (EOFError, ValueError):
            self._drop(peer)

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.rank is None:
            self._greet(peer, message)
        elif "failed" in message:
            self.event({**message, "rank": peer.rank})
        elif "failing" in message:
            self.failing({**message, "rank": peer.rank})
        elif "check" in message:
            self.check()
        elif "alive" in message and self._checked:
            self._checked[1].discard(peer.rank)
        elif "bye" in message:
            self._gone.add(peer.rank)
        elif "stop" in message:
            self._on_event({**message, "rank": peer.rank})

    def _greet(self, peer: _Peer, message: dict[str, Any]) -> None:
        rank, answer = self._greeting.check(peer.challenge, message)
        if not 0 < rank < self._world_size or rank in self._present():
            raise ValueError("no rank that is missing")
        peer.tell(encode(answer))
        with self._changed:
            peer.rank = rank
            self._seen.add(rank)
            self._changed.notify_all()
        if self._event is not None:
            peer.tell(encode(self._event))

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        with self._changed:
            self._peers.remove(peer)
            self._changed.notify_all()
        if peer.rank is not None and peer.rank not in self._gone:
            self.event({"lost": peer.rank})

    def _drop_strangers(self) -> None:
        now = time.monotonic()
        strangers = [peer for peer in self._peers if peer.rank is None]
        too_many = len(strangers) - _MAX_STRANGERS - self._world_size
        for place, peer in enumerate(strangers):
            if place < too_many or now - peer.opened > _HELLO_SECONDS:
                self._drop(peer)

    def _conclude_check(self) -> None:
        with self._changed:
            if self._checked is None:
                return
            due, silent = self._checked
            silent &= self._present()
            if silent and time.monotonic() < due:
                return
            self._checked = None
        if silent:
            self.event({"silent": min(silent)})
            for peer in [peer for peer in self._peers if peer.rank in silent]:
                self._drop(peer)  # nobody waits for its goodbye
        else:
            self.broadcast({"all_alive": True})
            self._on_event({"all_alive": True})

    def _conclude_failing(self) -> None:
        if self._failing is not None and time.monotonic() > self._failing[0]:
            message = dict(self._failing[1])
            self.event({"failed": message.pop("failing"), **message})

    def _take_pulse(self) -> None:
        if self._pulse.is_due():
            self.broadcast({"check": True})
        for rank, is_quiet in self._pulse.changes(self._present()):
            self._on_event({"quiet": is_quiet, "rank": rank})


def keep_alive(connection: socket.socket) -> None:
    """A cut link shows after about half a minute instead of two hours."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
