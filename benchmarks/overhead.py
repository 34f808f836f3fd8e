"""Overhead of our pipeline: measured step time / step time simulated from measured actions."""

import statistics

from comm.communicator import Communicator
from comm.objects import gather_json
from monitor.profiling.clock_sync import ClockSync
from monitor.profiling.step_trace import StepOfAllRanks, join_step, step_rows, step_times
from monitor.profiling.tracer import Tracer
from training.profiling import simulated_step


def engine_overhead(
    tracer: Tracer, control: Communicator, *, pp_mode: str, num_stages: int, num_microbatches: int
) -> float:
    """Returns the overhead over all steps except the first (warm-up); every rank must call it."""
    steps = _steps(tracer, control)[1:]
    measured = statistics.median(step.end - step.start for step in steps)
    return measured / simulated_step(
        steps, schedule=pp_mode, num_stages=num_stages, num_microbatches=num_microbatches
    )


def _steps(tracer: Tracer, control: Communicator) -> list[StepOfAllRanks]:
    clock = ClockSync()
    clock.measure(control)
    times = gather_json(control, step_times(tracer.steps, clock))
    joined = []
    for step in [trace.step for trace in tracer.steps]:
        rows = step_rows(tracer.steps, step, rank=control.rank, clock=clock)
        joined.append(join_step(step, times, gather_json(control, rows)))
    return joined
