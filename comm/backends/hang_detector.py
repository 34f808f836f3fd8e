"""A time limit for messages that are queued on a device; a thread checks the limit."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from comm.communicator import PeerLostError

_POLL_SECONDS = 0.25


class _PendingMessage(NamedTuple):
    operation: str
    is_done: Callable[[], bool]
    since: float


class HangDetector:
    """A thread that checks pending messages.

    limit: the longest time in seconds from the start of the wait to the end of the message.
    on_hang: the thread calls it once, for the first message that takes longer or fails.
    """

    def __init__(self, *, limit: float, on_hang: Callable[[PeerLostError], object]) -> None:
        self._limit = limit
        self._on_hang = on_hang
        self._messages: list[_PendingMessage] = []  # only the thread removes messages
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="hang-detector", daemon=True).start()

    def add(self, operation: str, is_done: Callable[[], bool]) -> None:
        """Adds a message to the checks. Call this when the wait for the message begins.

        `is_done` raises RuntimeError if the library reports a failure.
        """
        self._messages.append(_PendingMessage(operation, is_done, time.monotonic()))

    def close(self) -> None:
        """Ends the checks."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(_POLL_SECONDS):
            problem = self._problem()
            if problem is not None and not self._closed.is_set():
                self._on_hang(problem)
                return

    def _problem(self) -> PeerLostError | None:
        for message in tuple(self._messages):
            waited = time.monotonic() - message.since
            try:
                if message.is_done():
                    self._messages.remove(message)
                    continue
            except RuntimeError as error:
                return PeerLostError(f"{message.operation} failed after {waited:.1f} s: {error}.")
            if waited > self._limit:
                return PeerLostError(
                    f"{message.operation} took more than {waited:.0f} s (--dist-timeout)."
                )
        return None
