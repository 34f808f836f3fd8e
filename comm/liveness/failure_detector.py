"""Failure detection: events for a rank that died, hangs, failed or was asked to stop.

Every rank keeps one connection to a server on rank 0 (comm.liveness.server). The detector only
reports events; a policy decides about them (comm.liveness.failure_policy). The detector's threads
report the events, because the main thread may hang in a library that waits for a dead rank.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import BinaryIO, NamedTuple, TypeAlias

from comm.lifecycle.stop_signals import StopCause
from comm.liveness.client import connect_to_server
from comm.liveness.handshake import Handshake
from comm.liveness.heartbeat import Heartbeat
from comm.liveness.protocol import MAX_LINE, Message, decode, encode
from comm.liveness.server import LivenessServer
from comm.rendezvous.join import Rendezvous
from comm.rendezvous.signed_store import LIVENESS_ADDRESS
from comm.timing import DEFAULT_TIMING, Timing


class RankLost(NamedTuple):
    """The event that a rank died or no longer answers."""

    rank: int
    reason: str


class RankFailed(NamedTuple):
    """The event that a rank failed; all ranks should end with its exit status and error line."""

    rank: int
    status: int
    line: str


class HeartbeatChanged(NamedTuple):
    """The event that a connected rank stopped sending messages, or sends messages again."""

    rank: int
    is_unresponsive: bool


Event: TypeAlias = RankLost | RankFailed | HeartbeatChanged | StopCause


class FailureDetector:
    """A rank's failure detector: rank 0 runs the server, and every other rank is a client.

    The detector's threads call `on_event`. When another rank is asked to stop, only rank 0 gets an
    event, a StopCause. All methods can be called from any thread.
    """

    def __init__(
        self, rank: int, on_event: Callable[[Event], object], timing: Timing = DEFAULT_TIMING
    ) -> None:
        self._rank = rank
        self._timing = timing
        self._on_event = on_event
        self._server: LivenessServer | None = None
        self._connection: socket.socket | None = None
        self._failure_received = threading.Event()
        self._all_alive = threading.Event()
        self._closing = False
        self._heartbeat = Heartbeat(timing)  # of rank 0; the server watches the other ranks

    def connect(self, rendezvous: Rendezvous, *, master: str) -> list[int]:
        """Starts the server on rank 0, and connects any other rank; does nothing for a single rank.

        On rank 0, the result lists the ranks that joined but did not connect before the join
        deadline; on other ranks, it is empty. Raises ConnectionError as `connect_to_server` does;
        `master` is rank 0's name in errors.
        """
        if rendezvous.store is None or rendezvous.deadline is None:
            return []
        if self._rank == 0:
            return self._start_server(rendezvous, seconds=rendezvous.deadline.remaining)
        self._start_client(rendezvous, master)
        return []

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self._server is None and self._connection is None

    def forward_stop(self, number: int) -> None:
        """Sends rank 0 the number of the stop signal that this rank received."""
        self._send({"stop": number})

    def publish_failure(self, status: int, line: str) -> None:
        """Sends this rank's exit status and error line to all other ranks."""
        message = {"failed": status, "line": line, "rank": self._rank}
        if self._server is not None:
            self._server.publish(message)
        self._send(message)

    def await_publication(self, *, seconds: float) -> None:
        """Waits up to `seconds` until rank 0 publishes a failure; returns at once on rank 0."""
        if self._connection is not None:
            self._failure_received.wait(seconds)

    def await_departures(self, *, seconds: float) -> None:
        """Waits up to `seconds` until the other ranks disconnect; only rank 0 waits."""
        if self._server is not None:
            self._server.await_departures(seconds=seconds)

    def all_alive(self) -> bool:
        """Asks all ranks whether they are alive; returns whether all of them answer in time.

        If a rank other than 0 does not answer, `on_event` also gets a RankLost. If rank 0 does not
        answer, only the result shows it.
        """
        if self._server is not None:
            self._server.check()
        self._send({"check": True})
        return self.is_alone or self._all_alive.wait(self._timing.answer)

    def close(self) -> None:
        """Disconnects; rank 0 waits up to `Timing.close` for all other ranks to disconnect."""
        self._closing = True
        self._send({"bye": True})
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        if self._server is not None:
            self._server.await_departures(seconds=self._timing.close)
            self._server.close()

    def _start_server(self, rendezvous: Rendezvous, *, seconds: float) -> list[int]:
        assert rendezvous.store is not None
        address = rendezvous.participants[0].address
        self._server = LivenessServer(
            address=address,
            handshake=Handshake(rendezvous.key, rendezvous.nonce),
            world_size=len(rendezvous.participants),
            on_message=self._on_message,
            timing=self._timing,
        )
        rendezvous.store.set(LIVENESS_ADDRESS, f"{address} {self._server.port}")
        return self._server.await_all(seconds=seconds)

    def _start_client(self, rendezvous: Rendezvous, master: str) -> None:
        self._connection, lines = connect_to_server(rendezvous, master=master)
        for target in (partial(self._receive, lines), self._check_heartbeat):
            threading.Thread(target=target, name="liveness-client", daemon=True).start()

    def _send(self, message: Message) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):  # the reading thread reports a lost connection
                self._connection.sendall(encode(message))

    def _receive(self, lines: BinaryIO) -> None:
        with contextlib.suppress(OSError, ValueError), lines:
            for line in iter(lambda: lines.readline(MAX_LINE), b""):
                self._heartbeat.record(0)
                self._on_message(decode(line))
        self._failure_received.set()
        if not self._closing:
            self._on_event(RankLost(0, "the connection to it closed"))

    def _check_heartbeat(self) -> None:
        while not self._closing:
            for rank, is_unresponsive in self._heartbeat.changes([0]):
                self._on_event(HeartbeatChanged(rank, is_unresponsive))
            time.sleep(self._timing.client_tick)

    def _on_message(self, message: Message) -> None:
        if "check" in message:
            self._send({"alive": True})
        elif "all_alive" in message:
            self._all_alive.set()
        elif "bye" in message:
            self._closing = True
        elif "unresponsive" in message:
            self._on_event(HeartbeatChanged(message["rank"], message["unresponsive"]))
        elif "lost" in message:
            self._on_event(RankLost(message["lost"], "its connection closed unexpectedly"))
        elif "silent" in message:
            self._on_event(RankLost(message["silent"], "it does not answer"))
        elif "stop" in message:
            self._on_event(StopCause(int(message["rank"]), int(message["stop"])))
        elif "failed" in message:
            self._failure_received.set()
            self._on_event(RankFailed(message["rank"], int(message["failed"]), message["line"]))
