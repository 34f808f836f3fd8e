"""A signal asks this process to stop; it is heard in a thread of its own.

The main thread may be stuck in a library, where Python runs no handler. So the system's handler
writes the signal's number to a pipe, and the thread that reads it keeps the deadline. What a
request means depends on what the process is doing: its phase.
"""

from __future__ import annotations

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from comm.lifecycle.exit import exit_process, report_line

STOPPED = 75  # exit status: asked to stop, nothing is lost, not finished
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SECONDS = 2.0  # signals so close are one request: a terminal and a launcher may both send one
_TICK_SECONDS = 0.1
_JOIN_SECONDS = 5.0  # for the main thread to tell those that it is meeting


class StopCause(NamedTuple):
    """Which rank was asked to stop, and by the signal of which number."""

    rank: int
    number: int

    def __str__(self) -> str:
        return f"asked to stop ({signal.Signals(self.number).name} on rank {self.rank})"


class StopAskedError(Exception):
    """The ranks do not begin to train, as one was asked to stop."""


class Phase(NamedTuple):
    """What a request to stop means for a while.

    seconds: after so many this process ends by itself, from the thread that heard the signal.
    status, line: how it then ends.
    """

    seconds: float
    status: int
    line: str


NOT_BEGUN = "before training began: there is nothing to save, and the same command goes on"
JOINING = Phase(_JOIN_SECONDS, STOPPED, NOT_BEGUN)
LOADING = Phase(0.0, STOPPED, NOT_BEGUN)
CLOSING = Phase(math.inf, STOPPED, "")


def training(grace_seconds: float) -> Phase:
    """The loop looks at the request itself, and has `grace_seconds` for it."""
    line = (
        f"{grace_seconds:g} s ago (--grace-seconds), and what was trained since the last "
        "checkpoint is not saved yet; the same command goes on from that one"
    )
    return Phase(grace_seconds, 1, line)


def tidying(grace_seconds: float) -> Phase:
    """All is saved; what is superfluous is being removed, for as long as `grace_seconds` allow."""
    line = (
        "and what there was is saved, but not all that --keep-checkpoints drops is removed yet, "
        "which a later save does; the same command goes on"
    )
    return Phase(grace_seconds, STOPPED, line)


class StopRequest:
    """Whether a rank was asked to stop, as far as this process knows; the first request counts."""

    def __init__(self) -> None:
        self.asked: StopCause | None = None
        self.phase = JOINING

    def ask(self, asked: StopCause) -> None:
        if self.asked is None:
            self.asked = asked


class StopListener:
    """Turns SIGNALS into a request, and ends the process where it does not follow in time.

    A signal that the parent had this process ignore stays ignored. Only a main thread may make one.
    """

    def __init__(self, request: StopRequest, *, rank: int, alone: bool) -> None:
        self._request, self._rank, self._alone = request, rank, alone
        self._end: Callable[[int, str], object] = self._end_unlinked
        self._pass_on: Callable[[int], None] = lambda _number: None
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)
        threading.Thread(target=self._listen, name="stop-listener", daemon=True).start()

    def link(self, *, end: Callable[[int, str], object], pass_on: Callable[[int], None]) -> None:
        """From now on the others hear of it: of this process's end, and of a signal's number."""
        self._end, self._pass_on = end, pass_on

    def _listen(self) -> None:
        while (number := self._read(None)) is None:
            pass
        began, asked = time.monotonic(), StopCause(self._rank, number)
        self._request.ask(asked)
        self._pass_on(number)
        while True:
            waited, phase = time.monotonic() - began, self._request.phase
            if waited >= phase.seconds:
                self._end(phase.status, f"{asked} {phase.line}")
            again = self._read(_TICK_SECONDS)
            if again is not None and waited > SAME_SECONDS and phase is not CLOSING:
                self._end(1, f"{asked} and again ({signal.Signals(again).name}): ended at once")

    def _read(self, seconds: float | None) -> int | None:
        """The number of the next signal; None where none comes in time."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return None
        (number,) = os.read(self._pipe, 1)
        return number if number in SIGNALS else None

    def _end_unlinked(self, status: int, line: str) -> None:
        report_line(line if self._alone else f"rank {self._rank}: {line}")
        exit_process(status)
