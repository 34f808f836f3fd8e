"""Who has been heard lately: a process that hangs whole is told of long before who waits gives up.

A killed process closes its connection, which shows at once. One that is stopped, or swaps, or whose
machine has gone, leaves it open.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

ASK_SECONDS = 10.0  # between the questions to which all answer
QUIET_SECONDS = 30.0  # without a word, until it is told


class Heartbeat:
    """When each of some ranks was last heard."""

    def __init__(self) -> None:
        self._asked = self._looked = time.monotonic()
        self._heard: dict[int, float] = {}
        self._quiet: set[int] = set()

    def is_due(self) -> bool:
        """Whether it is time to ask; if so, it is taken as done."""
        now = time.monotonic()
        if now - self._asked < ASK_SECONDS:
            return False
        self._asked = now
        return True

    def heard(self, rank: int) -> None:
        """Something came from it."""
        self._heard[rank] = time.monotonic()

    def changes(self, present: Iterable[int]) -> list[tuple[int, bool]]:
        """Of those that are connected, who has become quiet (True), or speaks again (False).

        It is to be called all the time: who was stopped itself blames nobody.
        """
        now = time.monotonic()
        if now - self._looked > QUIET_SECONDS / 2:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now
        quiet = {
            rank for rank in present if now - self._heard.setdefault(rank, now) > QUIET_SECONDS
        }
        changed = sorted(quiet ^ self._quiet)
        self._quiet = quiet
        return [(rank, rank in quiet) for rank in changed]
