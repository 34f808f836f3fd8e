"""Profiling of a run (--profiling): the tracer of each rank, its trace file, and timeline.png."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.profiling.breakdown import SimulatedSpan
from monitor.profiling.clock_sync import ClockSync, HostMessages
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

# Returns the values of all ranks, in the order of the ranks; every rank calls this function.
Gather = Callable[[Any], Sequence[Any]]
# Returns the simulation of a measured step.
Simulate = Callable[[StepOfAllRanks], Sequence[SimulatedSpan]]


@dataclass(frozen=True)
class Profiler:
    """A rank's tracer, the ClockSync for its times, and a communicator to measure clock offsets."""

    tracer: Tracer
    clock: ClockSync
    messages: HostMessages

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
        """Writes the trace and, on rank 0, timeline.png of the median step; every rank calls this.

        Args:
            gather: gathers a JSON value from all ranks.
            simulate: simulates a measured step.
            schedule, num_stages, num_replicas, num_microbatches: the run's values, for the title.
            folder: the folder of timeline.png.

        Returns:
            The timeline on rank 0 if all ranks have traced a common step; else None.
        """
        self.clock.measure(self.messages)
        self.tracer.close()
        steps, rank = self.tracer.steps, self.messages.rank
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


def start_profiling(
    messages: HostMessages, *, run: str, cuda: bool, folder: Path = TRACE_FOLDER
) -> Profiler:
    """Synchronizes the clocks and starts a tracer; every rank calls this.

    Args:
        messages: the communicator of all ranks.
        run: the name of the run, part of the name of the trace file.
        cuda: whether the run is on GPUs.
        folder: the folder of the trace files.
    """
    clock = ClockSync()
    clock.measure(messages)
    path = trace_path(run, messages.rank, folder=folder)
    log = StepLog(TraceFile(path, rank=messages.rank, clock=clock).write)
    return Profiler(CudaTracer(log) if cuda else HostTracer(log), clock, messages)
