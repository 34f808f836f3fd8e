"""A limit on how long a message queued on a device may take, kept without holding up the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from comm.backends.streams import Event
from comm.communicator import PeerLostError

_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class _HangMessage:
    what: str
    mark: Event
    check: Callable[[], None]
    since: float


class HangDetector:
    """Watches queued messages from a thread of its own.

    limit: seconds that a message may take from being waited for: it may be queued ahead of need.
    on_hang: called, in that thread, for the first message that takes longer or fails.
    """

    def __init__(self, *, limit: float, on_hang: Callable[[PeerLostError], object]) -> None:
        self._limit = limit
        self._on_hang = on_hang
        self._messages: list[_HangMessage] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="hang-monitor", daemon=True).start()

    def add(self, what: str, mark: Event, check: Callable[[], None]) -> None:
        """The message is waited for from now on.

        `check` raises RuntimeError where the library knows of a failure.
        """
        with self._lock:
            self._messages.append(_HangMessage(what, mark, check, time.monotonic()))

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            problem = self._problem()
            if problem is not None and not self._closed.is_set():
                self._on_hang(problem)
                return

    def _problem(self) -> PeerLostError | None:
        with self._lock:
            messages = list(self._messages)
        for message in messages:
            waited = time.monotonic() - message.since
            try:
                if message.mark.reached():
                    self._forget(message)
                    continue
                message.check()
            except RuntimeError as error:
                return PeerLostError(f"{message.what} failed after {waited:.1f} s: {error}.")
            if waited > self._limit:
                return PeerLostError(
                    f"{message.what} took more than {waited:.0f} s (--dist-timeout)."
                )
        return None

    def _forget(self, message: _HangMessage) -> None:
        with self._lock:
            self._messages.remove(message)
