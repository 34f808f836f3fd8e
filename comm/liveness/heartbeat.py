"""Heartbeats; without them, an unresponsive rank is noticed only when a collective times out.

When a process is killed, its connection closes, and the server notices this at once. When a process
is suspended, or its machine loses power or is busy with swapping memory, the connection stays open,
and only the missing heartbeats show the failure.
"""

import time
from collections.abc import Iterable

from comm.timing import Timing


class Heartbeat:
    """The time of the last message of each rank."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._last_check = self._last_call = time.monotonic()
        self._last_message: dict[int, float] = {}
        self._unresponsive: set[int] = set()

    def is_due(self) -> bool:
        """Returns whether a check of all ranks is due; if so, the interval starts again."""
        now = time.monotonic()
        if now - self._last_check < self._timing.heartbeat_interval:
            return False
        self._last_check = now
        return True

    def record(self, rank: int) -> None:
        """Records that a message of `rank` arrived now."""
        self._last_message[rank] = time.monotonic()

    def changes(self, connected: Iterable[int]) -> list[tuple[int, bool]]:
        """Returns the connected ranks that became unresponsive (True) or responsive again (False).

        Call this often. A long pause between two calls means that this process itself was
        suspended; then, for every rank, the time since its last message starts again at 0.
        """
        now = time.monotonic()
        if now - self._last_call > self._timing.unresponsive / 2:
            self._last_message = dict.fromkeys(self._last_message, now)
        self._last_call = now
        unresponsive = {
            rank
            for rank in connected
            if now - self._last_message.setdefault(rank, now) > self._timing.unresponsive
        }
        changed = sorted(unresponsive ^ self._unresponsive)
        self._unresponsive = unresponsive
        return [(rank, rank in unresponsive) for rank in changed]
