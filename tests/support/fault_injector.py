"""Injector of faults into ranks during one start of a run; the ranks' parent process uses it."""

import contextlib
import os
import resource
import select
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from monitor.metrics import read_metrics
from tests.support.connections import Cutter, between
from tests.support.fault_plan import CUT, FULL, KILL, STOP, TERM, UNPLUGGED, Fault
from tests.support.hooks import Kill
from tests.support.hosts import Host, plug
from tests.support.kill_lab import STAGES, WORLD, WRITERS
from tests.support.phases import PhaseMarks, Phases
from tests.support.runs import Hook

_SIGNALS = {KILL: signal.SIGKILL, STOP: signal.SIGSTOP, TERM: signal.SIGTERM}
SMALL_FILES = 30_000  # bytes; more than a rank's output, less than a stage's weights


@dataclass(frozen=True)
class Hit:
    """A fault that happened, the phase of its rank at that moment, and the time in seconds."""

    fault: Fault
    phase: str
    at: float


@dataclass(frozen=True)
class Point(Kill):
    """A moment at which a rank waits until its parent process has caused the fault."""

    reached: tuple[int, int] = field(default_factory=os.pipe)
    go_on: tuple[int, int] = field(default_factory=os.pipe)

    def _strike(self) -> None:
        time.sleep(self.wait)
        os.write(self.reached[1], b".")
        os.read(self.go_on[0], 1)

    def is_reached(self) -> bool:
        return bool(select.select([self.reached[0]], [], [], 0)[0])

    def leave(self) -> None:
        os.write(self.go_on[1], b".")

    def close(self) -> None:
        for descriptor in (*self.reached, *self.go_on):
            os.close(descriptor)


def point(fault: Fault) -> Point | None:
    """Returns a Point for the fault's named moment; None if the fault has no named moment."""
    one = fault.moment
    if one is None:
        return None
    return Point(one.name, fault.rank, one.target, one.when, one.nth, one.about, one.wait)


class Injector:
    """Attendant (see tests.support.runs) that causes faults in the ranks during one start of a run.

    steps: number of steps of the complete run.
    life: seconds of an undisturbed run.
    metrics: path of the run's metrics.jsonl.
    hosts: the machines of the stages; empty if all ranks share one machine.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        *,
        steps: int,
        life: float,
        metrics: Path,
        hosts: Sequence[Host],
    ) -> None:
        self.hits: list[Hit] = []
        self._waiting = {fault: point(fault) for fault in faults}
        self._cutters = [Cutter(rank) for rank in range(WORLD)]
        self._points = [one for one in self._waiting.values() if one is not None]
        self._phases, self._hosts = Phases(WORLD), hosts
        self._metrics, self._done = metrics, len(read_metrics(metrics))
        self._steps = steps
        self._life = life * (1 - self._done / (steps + 1))
        self._began: float | None = None
        self._room: dict[Fault, float] = {}  # time at which a full disk has space again

    def armed(self) -> list[Hook]:
        """Resets the phases; returns the hooks for the ranks of the start."""
        self._phases.begin()
        return [
            *(PhaseMarks(rank, self._phases) for rank in range(WORLD)),
            *self._cutters,
            *self._points,
        ]

    def attend(self, pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
        now = time.monotonic()
        self._began = self._began or now
        for fault, one in list(self._waiting.items()):
            due = one.is_reached() if one else fault.share < self._share(now)
            if due and fault.rank not in ended:
                del self._waiting[fault]
                self.hits.append(Hit(fault, self._phases.of(fault.rank), now))
                self._strike(fault, pids, ended)
                if one is not None and fault.kind not in (KILL, STOP):
                    one.leave()
        for fault, end in list(self._room.items()):
            if now > end:
                self._limit_files(fault.rank, pids, resource.RLIM_INFINITY)
                del self._room[fault]
        self._end_stopped(pids, ended)

    def close(self) -> None:
        """Restores the link between hosts if a fault cut it; closes all pipes to the ranks."""
        for hit in self.hits:
            if hit.fault.kind == UNPLUGGED:
                plug(self._hosts[0], up=True)
        for cutter in self._cutters:
            cutter.close()
        for one in self._points:
            one.close()

    def _share(self, now: float) -> float:
        """Returns the completed fraction of the steps that were left when this start began.

        The clock gives one fraction, and the metrics give another; the larger one counts. The clock
        is needed before the first step, and while a full disk delays the metrics. The metrics are
        needed if the run is faster than the undisturbed run.
        """
        assert self._began is not None
        begun, steps = self._done, len(read_metrics(self._metrics))
        return max((now - self._began) / self._life, (steps - begun) / max(self._steps - begun, 1))

    def _strike(self, fault: Fault, pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
        if fault.kind == FULL:
            self._limit_files(fault.rank, pids, SMALL_FILES)
            if fault.rest is not None:
                self._room[fault] = time.monotonic() + fault.rest
        elif fault.kind == CUT:
            self._cut(fault, pids, ended)
        elif fault.kind == UNPLUGGED:
            plug(self._hosts[0], up=False)
        else:
            all_left = [rank for rank in range(WORLD) if rank not in ended]
            to_all = fault.kind == TERM and fault.to_all
            for rank in all_left if to_all else [fault.rank]:
                os.kill(pids[rank], _SIGNALS[fault.kind])

    def _limit_files(self, rank: int, pids: Sequence[int], size: int) -> None:
        """Limits the size of the files that ranks can write to the disk of `rank`."""
        for writer in WRITERS:
            if not self._hosts or writer % STAGES == rank % STAGES:
                with contextlib.suppress(ProcessLookupError):
                    limits = (size, resource.RLIM_INFINITY)
                    resource.prlimit(pids[writer], resource.RLIMIT_FSIZE, limits)

    def _cut(self, fault: Fault, pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
        if fault.peer in ended:
            return
        found = between(pids[fault.rank], pids[fault.peer])
        if fault.one and found:
            found = [found[int(fault.share * len(found))]]
        self._cutters[fault.rank].cut(found)

    def _end_stopped(self, pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
        """Kills a stopped rank after all other ranks have ended."""
        for hit in self.hits:
            alone = hit.fault.rank not in ended and len(ended) == WORLD - 1
            if hit.fault.kind == STOP and alone:
                os.kill(pids[hit.fault.rank], signal.SIGKILL)
