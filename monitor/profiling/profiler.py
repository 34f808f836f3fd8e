"""--profiling from its beginning to its end: a tracer for the run, and at last its picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.profiling.breakdown import SimulatedSpan
from monitor.profiling.clock_sync import ClockSync, Group
from monitor.profiling.cuda_tracer import CudaTracer
from monitor.profiling.step_trace import (
    StepOfAllRanks,
    join_step,
    median_step,
    step_rows,
    step_times,
)
from monitor.profiling.timeline import Timeline, draw_timeline
from monitor.profiling.trace_file import TRACE_FOLDER, TraceFile, trace_path
from monitor.profiling.tracer import HostTracer, StepLog, Tracer

TIMELINE_NAME = "timeline.png"

# Every member's value, in the order of the members; all call it.
Gather = Callable[[Any], Sequence[Any]]
# The simulated step, given the measured one.
Simulate = Callable[[StepOfAllRanks], Sequence[SimulatedSpan]]


@dataclass(frozen=True)
class Profiler:
    """A rank's tracer and the clock that its times are told in."""

    tracer: Tracer
    clock: ClockSync
    group: Group

    def finish(
        self,
        gather: Gather,
        simulate: Simulate,
        *,
        schedule: str,
        num_stages: int,
        num_replicas: int,
        num_microbatches: int,
        folder: Path = TRACE_FOLDER,
    ) -> Timeline | None:
        """Writes the trace and, on rank 0, timeline.png of the median step; every rank calls it.

        Returns what is drawn; None elsewhere, and where there is no step that all ranks have.
        """
        self.clock.measure(self.group)
        self.tracer.close()
        steps, rank = self.tracer.steps, self.group.rank
        times = gather(step_times(steps, self.clock))
        step = median_step(times)
        if step is None:
            return None
        rows = gather(step_rows(steps, step, rank=rank, clock=self.clock))
        if rank != 0:
            return None
        measured = join_step(step, times, rows)
        timeline = Timeline(
            measured, simulate(measured), schedule, num_stages, num_replicas, num_microbatches
        )
        draw_timeline(timeline, folder / TIMELINE_NAME)
        return timeline


def start_profiling(group: Group, *, run: str, cuda: bool, folder: Path = TRACE_FOLDER) -> Profiler:
    """Finds the clock of all ranks, so every rank calls it; the trace's file is named for `run`."""
    clock = ClockSync()
    clock.measure(group)
    rank = group.rank
    file = TraceFile(trace_path(run, rank, folder=folder), rank=rank, clock=clock)
    log = StepLog(file.write)
    return Profiler(CudaTracer(log) if cuda else HostTracer(log), clock, group)
