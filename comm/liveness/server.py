"""The liveness server on rank 0: notices when ranks fail, and sends the first failure to all ranks.

A message is one JSON object per line. The server first sends {"challenge"}. A rank replies with
{"rank", "challenge", "proof"}, and the server answers {"proof"} (comm.liveness.handshake). Then:
    to the server: {"failed": status, "line"} | {"check": true} | {"alive": true} | {"bye": true}
                   | {"stop": signal}: the rank was asked to stop
    to the ranks:  {"lost": rank}: its connection closed | {"silent": rank}: it does not answer
                   | {"failed": status, "line", "rank"} | {"check": true} | {"all_alive": true}
                   | {"bye": true}
Only rank 0 itself gets {"stop": signal, "rank"} and {"unresponsive": true or false, "rank"}.
At regular intervals (comm.liveness.heartbeat), and whenever a rank sends {"check"}, the server asks
all ranks whether they are alive.
"""

import contextlib
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable

from comm.liveness.handshake import Handshake
from comm.liveness.heartbeat import Heartbeat
from comm.liveness.protocol import MAX_LINE, Message, decode, encode, set_keep_alive
from comm.timing import DEFAULT_TIMING, Timing

_MAX_REPLY_BYTES = 1024  # limit for a connection before its handshake
_MAX_UNPROVED = 64  # limit of connections without a handshake, in addition to one for each rank


class _Connection:
    """A rank's connection to the server; `rank` is None until the handshake."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.challenge = secrets.token_hex(16)
        self.rank: int | None = None
        self.opened = time.monotonic()
        self._buffer = b""

    def receive(self) -> list[bytes]:
        """Receives data and returns the lines that are complete.

        Raises EOFError if the connection ended, or if a line is longer than the limit.
        """
        try:
            data = self.socket.recv(MAX_LINE)
        except OSError as error:
            raise EOFError from error
        limit = _MAX_REPLY_BYTES if self.rank is None else 2 * MAX_LINE
        if not data or len(self._buffer) + len(data) > limit:
            raise EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return lines

    def send(self, line: bytes) -> None:
        with contextlib.suppress(OSError):  # the next read detects a lost connection
            self.socket.sendall(line)


class LivenessServer:
    """A server that listens on `address` in a thread; messages for rank 0 go to `on_message`."""

    def __init__(
        self,
        *,
        address: str,
        handshake: Handshake,
        world_size: int,
        on_message: Callable[[Message], None],
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._timing = timing
        self._handshake = handshake
        self._world_size = world_size
        self._on_message = on_message
        self._listener = socket.create_server(
            (address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET
        )
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: list[_Connection] = []
        self._departed: set[int] = set()  # ranks that said bye
        self._seen: set[int] = set()
        self._failure: Message | None = None
        self._check: tuple[float, set[int]] | None = None  # deadline, ranks without an answer
        self._heartbeat = Heartbeat(timing)
        self._changed = threading.Condition()
        self._closing = False
        threading.Thread(target=self._serve, name="liveness-server", daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def await_all(self, *, seconds: float) -> list[int]:
        """Waits up to `seconds` until all other ranks are connected; returns the missing ranks."""
        ranks = set(range(1, self._world_size))
        self._await(lambda: self._seen == ranks, seconds)
        missing = ranks - self._seen
        self._seen |= missing  # so that `await_departures` does not wait for missing ranks
        return sorted(missing)

    def await_departures(self, *, seconds: float) -> None:
        """Waits up to `seconds` until every other rank has connected and disconnected.

        It also waits for ranks that are not connected yet, because the message about a failure must
        reach them too.
        """
        self._await(
            lambda: len(self._seen) == self._world_size - 1 and not self._connected(), seconds
        )

    def publish(self, message: Message) -> None:
        """Sends the first failure to all ranks, rank 0 included; later failures are not sent."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._failure = message
        self._broadcast(message)
        threading.Thread(target=self._on_message, args=(message,), daemon=True).start()

    def check(self) -> None:
        """Asks all ranks whether they are alive.

        Later the server sends the result to all ranks: `silent` or `all_alive`.
        """
        with self._changed:
            if self._check is None:
                self._check = (time.monotonic() + self._timing.check, self._connected())
                self._broadcast({"check": True})

    def close(self) -> None:
        """Tells all connected ranks that the run ends; a connection lost later is no failure."""
        with self._changed:
            self._closing = True
        self._broadcast({"bye": True})

    def _broadcast(self, message: Message) -> None:
        line = encode(message)
        for connection in list(self._connections):
            if connection.rank is not None:
                connection.send(line)

    def _await(self, condition: Callable[[], bool], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(condition, timeout=max(seconds, 0.0))

    def _connected(self) -> set[int]:
        connections = list(self._connections)
        return {connection.rank for connection in connections if connection.rank is not None}

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select(self._timing.serve_tick):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._drop_unproved()
            self._conclude_check()
            self._check_heartbeats()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the client may have closed it already
            accepted, _ = self._listener.accept()
            accepted.settimeout(self._timing.send)
            set_keep_alive(accepted)
            connection = _Connection(accepted)
            self._connections.append(connection)
            self._selector.register(accepted, selectors.EVENT_READ, connection)
            connection.send(encode({"challenge": connection.challenge}))

    def _read(self, connection: _Connection) -> None:
        try:
            for line in connection.receive():
                self._handle(connection, decode(line))
                if connection.rank is not None:
                    self._heartbeat.record(connection.rank)
        except (EOFError, ValueError):
            self._drop(connection)

    def _handle(self, connection: _Connection, message: Message) -> None:
        if connection.rank is None:
            self._shake_hands(connection, message)
        elif "failed" in message:
            self.publish({**message, "rank": connection.rank})
        elif "check" in message:
            self.check()
        elif "alive" in message and self._check:
            self._check[1].discard(connection.rank)
        elif "bye" in message:
            self._departed.add(connection.rank)
        elif "stop" in message:
            self._on_message({**message, "rank": connection.rank})

    def _shake_hands(self, connection: _Connection, reply: Message) -> None:
        rank, answer = self._handshake.check(connection.challenge, reply)
        if not 0 < rank < self._world_size or rank in self._connected():
            raise ValueError("the rank is unknown or already connected")
        connection.send(encode(answer))
        with self._changed:
            connection.rank = rank
            self._seen.add(rank)
            self._changed.notify_all()
        if self._failure is not None:
            connection.send(encode(self._failure))

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.socket)
        connection.socket.close()
        with self._changed:
            self._connections.remove(connection)
            self._changed.notify_all()
        if connection.rank is not None and connection.rank not in self._departed:
            self.publish({"lost": connection.rank})

    def _drop_unproved(self) -> None:
        """Drops connections without a handshake: late ones, and the oldest if they are too many."""
        now = time.monotonic()
        unproved = [connection for connection in self._connections if connection.rank is None]
        num_surplus = len(unproved) - _MAX_UNPROVED - self._world_size
        for index, connection in enumerate(unproved):
            if index < num_surplus or now - connection.opened > self._timing.handshake:
                self._drop(connection)

    def _conclude_check(self) -> None:
        with self._changed:
            if self._check is None:
                return
            deadline, silent = self._check
            silent &= self._connected()
            if silent and time.monotonic() < deadline:
                return
            self._check = None
        if not silent:
            self._broadcast({"all_alive": True})
            self._on_message({"all_alive": True})
            return
        self.publish({"silent": min(silent)})
        for connection in list(self._connections):
            if connection.rank in silent:
                self._drop(connection)  # so that `await_departures` does not wait for this rank

    def _check_heartbeats(self) -> None:
        if self._heartbeat.is_due():
            self._broadcast({"check": True})
        for rank, is_unresponsive in self._heartbeat.changes(self._connected()):
            self._on_message({"unresponsive": is_unresponsive, "rank": rank})
