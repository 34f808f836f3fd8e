"""Signals that ask this process to stop, received in a thread of their own.

The main thread may be stuck in a library, where Python runs no handler. So the system's handler
writes the signal's number to a pipe, and the thread that reads it keeps the deadline. The meaning
of a request depends on the phase of the process.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from comm.lifecycle.exit import report_and_exit
from comm.timing import DEFAULT_TIMING, Timing

STOPPED = 75  # exit status: asked to stop, nothing is lost, not finished
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_TICK_SECONDS = 0.1
_JOIN_SECONDS = 5.0  # for the main thread to tell the ranks that it joins


class StopCause(NamedTuple):
    """The rank that was asked to stop, and the number of the signal."""

    rank: int
    number: int

    def __str__(self) -> str:
        return f"asked to stop ({signal.Signals(self.number).name} on rank {self.rank})"


class StopAskedError(Exception):
    """A rank was asked to stop before the ranks had joined."""


class Phase(NamedTuple):
    """The meaning of a request to stop during a phase of the process.

    seconds: after these the thread that received the signal ends this process.
    status, line: the exit status and the line of that end.
    """

    seconds: float
    status: int
    line: str


NOT_BEGUN = "before training began: there is nothing to save, and the same command goes on"
JOINING = Phase(_JOIN_SECONDS, STOPPED, NOT_BEGUN)
LOADING = Phase(0.0, STOPPED, NOT_BEGUN)
CLOSING = Phase(math.inf, STOPPED, "")


def training(grace_seconds: float) -> Phase:
    """Returns the phase of the training loop, which has `grace_seconds` to follow a request."""
    line = (
        f"{grace_seconds:g} s ago (--grace-seconds): the steps since the last checkpoint are not "
        "saved; the same command resumes from that checkpoint"
    )
    return Phase(grace_seconds, 1, line)


def cleanup(grace_seconds: float) -> Phase:
    """Returns the phase after the last save, in which superfluous checkpoints are deleted."""
    line = (
        "with the last step saved; not all checkpoints that --keep-checkpoints drops are deleted "
        "yet, a later save deletes them; the same command goes on"
    )
    return Phase(grace_seconds, STOPPED, line)


class StopRequest:
    """The first request to stop that this process knows of, if any, and the current phase."""

    def __init__(self) -> None:
        self.asked: StopCause | None = None
        self.phase = JOINING

    def ask(self, asked: StopCause) -> None:
        if self.asked is None:
            self.asked = asked


class StopListener:
    """Turns SIGNALS into a request, and ends the process if it does not follow in time.

    A signal that the parent made this process ignore stays ignored. Only the main thread may
    construct a listener.
    """

    def __init__(
        self,
        request: StopRequest,
        *,
        rank: int,
        alone: bool,
        timing: Timing = DEFAULT_TIMING,
    ) -> None:
        self._same_seconds = timing.same_stop
        self._request, self._rank, self._alone = request, rank, alone
        self._end: Callable[[int, str], object] = self._report_and_exit
        self._forward: Callable[[int], None] = lambda _number: None
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)
        threading.Thread(target=self._listen, name="stop-listener", daemon=True).start()

    def hand_over(
        self, *, end: Callable[[int, str], object], forward: Callable[[int], None]
    ) -> None:
        """Lets `end` end the process from now on, and `forward` tell others a signal's number."""
        self._end, self._forward = end, forward

    def _listen(self) -> None:
        while (number := self._read(None)) is None:
            pass
        began, asked = time.monotonic(), StopCause(self._rank, number)
        self._request.ask(asked)
        self._forward(number)
        while True:
            waited, phase = time.monotonic() - began, self._request.phase
            if waited >= phase.seconds:
                self._end(phase.status, f"{asked} {phase.line}")
            again = self._read(_TICK_SECONDS)
            if again is not None and waited > self._same_seconds and phase is not CLOSING:
                self._end(1, f"{asked} and again ({signal.Signals(again).name}): ended at once")

    def _read(self, seconds: float | None) -> int | None:
        """Returns the number of the next signal; None if none comes in time."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return None
        (number,) = os.read(self._pipe, 1)
        return number if number in SIGNALS else None

    def _report_and_exit(self, status: int, line: str) -> None:
        report_and_exit(status, line if self._alone else f"rank {self._rank}: {line}")
