"""The policy for failures: every failure of a rank ends all processes.

A run continues from its latest checkpoint when all ranks start again. A future policy could
continue without a lost rank; it would use the events of the same detector.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from comm.communicator import CurrentOperation
from comm.lifecycle.exit import exit_process, report_line
from comm.lifecycle.stop_signals import StopCause, StopRequest
from comm.liveness.failure_detector import (
    Event,
    FailureDetector,
    HeartbeatChanged,
    RankFailed,
    RankLost,
)
from comm.rendezvous.join import Rendezvous
from comm.timing import DEFAULT_TIMING, Timing
from comm.topology import Topology

logger = logging.getLogger(__name__)

_RESUME = "Start all ranks again to resume from the latest checkpoint."


class ExitPolicy:
    """A policy that reports the first failure of any rank in one line and ends this process.

    detector: passes every event to this policy.
    operation: the communication that this rank waits for; an error about a lost rank quotes it.
    stop: on rank 0, gets the stop requests of other ranks.
    """

    def __init__(
        self, rendezvous: Rendezvous, topology: Topology, *, stop: StopRequest, timing: Timing
    ) -> None:
        self.detector = FailureDetector(rendezvous.rank, self._on_event, timing)
        self.operation = CurrentOperation()
        self._rank = rendezvous.rank
        self._deadline = rendezvous.deadline
        self._names = [
            topology.describe(participant.rank, host=participant.host)
            for participant in rendezvous.participants
        ]
        self._stop = stop
        self._timing = timing
        self._claimed = threading.Lock()
        self._exit_seconds = 2 * timing.linger

    @classmethod
    def connect(
        cls,
        rendezvous: Rendezvous,
        topology: Topology,
        *,
        stop: StopRequest | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> "ExitPolicy":
        """Starts failure detection on this rank; raises ConnectionError like `connect_to_server`.

        If a rank joined but does not connect to rank 0 before the join deadline, all ranks end.
        """
        policy = cls(rendezvous, topology, stop=stop or StopRequest(), timing=timing)
        missing = policy.detector.connect(rendezvous, master=policy._names[0])
        if missing:
            names = ", ".join(policy._names[rank] for rank in missing)
            address = rendezvous.participants[0].address
            policy.fail(1, f"{names} joined but did not connect to rank 0 at {address} in time")
        if rendezvous.deadline is not None:
            rendezvous.deadline.hand_over(policy._join_deadline_passed)
        return policy

    def fail(
        self, status: int, line: str, *, before_exit: Callable[[], object] | None = None
    ) -> NoReturn:
        """Ends this process because of its own error; makes all other ranks end and report it.

        Args:
            status: the exit status of all ranks.
            line: the error; every rank reports it once.
            before_exit: runs after the error was sent to the other ranks; it may take a minute.
        """
        self._claim()
        if before_exit is not None:
            self._exit_seconds = self._timing.before_exit
        report_line(line if self.detector.is_alone else f"rank {self._rank}: {line}")
        self.detector.publish_failure(status, line)
        if before_exit is not None:
            try:
                before_exit()
            except Exception as error:  # only logged, because the first error ends the process
                logger.warning("error during the exit: %s: %s", type(error).__name__, error)
        self.detector.await_publication(seconds=self._timing.linger)
        self._exit(status)

    def operation_failed(
        self, error: BaseException, *, before_exit: Callable[[], object] | None = None
    ) -> NoReturn:
        """Ends this process because an operation with other ranks failed; reports the cause.

        The cause is often another rank that died or hangs. So this rank first asks all ranks
        whether they are alive. It reports the text of `error` only if all are alive. `before_exit`
        is used as in `fail`.
        """
        if self.detector.all_alive():
            self.fail(1, f"{error} {_RESUME}", before_exit=before_exit)
        self._end(1, self._lost(0, "it does not answer"))

    def _join_deadline_passed(self, status: int, line: str) -> NoReturn:
        """Ends this process at the join deadline; if a rank hangs, the error names the rank."""
        if self.detector.all_alive():
            self.fail(status, line.removeprefix(f"rank {self._rank}: "))
        self._end(status, self._lost(0, "it does not answer"))

    def _on_event(self, event: Event) -> None:
        match event:
            case StopCause():
                self._stop.ask(event)
            case HeartbeatChanged(rank, is_unresponsive=True):
                logger.warning(
                    "%s has not responded for %g s (suspended, overloaded, or network down); the "
                    "job aborts when an operation exceeds --dist-timeout",
                    self._names[rank],
                    self._timing.unresponsive,
                )
            case HeartbeatChanged(rank):
                logger.warning("%s responds again", self._names[rank])
            case RankLost(rank, reason):
                self._end(1, self._lost(rank, reason))
            case RankFailed(rank, status, line):
                self._end(status, f"rank {rank}: {line}")

    def _lost(self, rank: int, reason: str) -> str:
        return (
            f"{self._names[rank]} is gone: {reason}, while this rank was in: "
            f"{self.operation.text}. {_RESUME}"
        )

    def _claim(self) -> None:
        """Returns only in the first thread that calls it; this thread must then end the process.

        A later thread waits here, and ends the process if the first thread does not do so in time.
        """
        if not self._claimed.acquire(blocking=False):
            time.sleep(self._exit_seconds)
            exit_process(1)
        if self._deadline is not None:
            self._deadline.cancel()  # otherwise it would report a second error line

    def _end(self, status: int, line: str) -> NoReturn:
        """Ends this process because another rank failed, unless another thread already ends it."""
        self._claim()
        report_line(f"rank {self._rank}: {line}")
        self._exit(status)

    def _exit(self, status: int) -> NoReturn:
        self.detector.await_departures(seconds=self._timing.linger)
        exit_process(status)
