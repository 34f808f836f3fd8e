"""One step of all ranks, joined from the traces that ranks exchange as small JSON lists."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from monitor.profiling.clock_sync import ClockSync
from monitor.profiling.tracer import PIPELINE_WORK, StepTrace, Track


class RankSpan(NamedTuple):
    """A span of a rank; start and end are seconds since the run began."""

    rank: int
    track: Track
    microbatch: int | None
    start: float
    end: float


class StepOfAllRanks(NamedTuple):
    """A step; `start` is the earliest over all ranks, `end` the latest, in seconds."""

    step: int
    start: float
    end: float
    spans: list[RankSpan]


def step_times(steps: Sequence[StepTrace], clock: ClockSync) -> list[list[float]]:
    """Returns [step, start, end] of each step of this rank, in seconds since the run began."""
    return [[s.step, _seconds(s.begin, clock), _seconds(s.end, clock)] for s in steps]


def median_step(times: Sequence[Sequence[Sequence[float]]]) -> int | None:
    """Returns the step of median length among those that all ranks traced; None if there is none.

    A step lasts from the earliest start on any rank to the latest end on any rank. If the number of
    steps is even, the shorter of the two middle steps is chosen. `times` are the `step_times` of
    all ranks.
    """
    by_step: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for of_rank in times:
        for step, start, end in of_rank:
            by_step[int(step)].append((start, end))
    lengths = {
        step: max(end for _, end in bounds) - min(start for start, _ in bounds)
        for step, bounds in by_step.items()
        if len(bounds) == len(times)
    }
    ordered = sorted(lengths, key=lambda step: (lengths[step], step))
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def step_rows(
    steps: Sequence[StepTrace], step: int, *, rank: int, clock: ClockSync
) -> list[list[Any]]:
    """Returns [rank, track, microbatch, start, end] for each span of this rank in one step."""
    return [
        [rank, s.track.value, s.microbatch, _seconds(s.begin, clock), _seconds(s.end, clock)]
        for trace in steps
        if trace.step == step
        for s in trace.spans
    ]


def join_step(
    step: int,
    times: Sequence[Sequence[Sequence[float]]],
    rows: Sequence[Sequence[Sequence[Any]]],
) -> StepOfAllRanks:
    """Returns step `step`, joined from the `step_times` and `step_rows` of all ranks."""
    bounds = [row for of_rank in times for row in of_rank if row[0] == step]
    spans = [
        RankSpan(rank, Track(track), microbatch, start, end)
        for of_rank in rows
        for rank, track, microbatch, start, end in of_rank
    ]
    return StepOfAllRanks(step, min(row[1] for row in bounds), max(row[2] for row in bounds), spans)


def compute_costs(spans: Sequence[RankSpan], *, num_stages: int) -> dict[tuple[int, Track], float]:
    """Returns the median seconds of computing one microbatch, by (stage, compute track).

    The median is over all microbatches of all replicas. The simulator uses these times, so that the
    simulation is comparable to the measured step.
    """
    seconds: dict[tuple[int, Track], list[float]] = defaultdict(list)
    for span in spans:
        if span.microbatch is not None and span.track in PIPELINE_WORK:
            seconds[span.rank % num_stages, span.track].append(span.end - span.start)
    return {key: statistics.median(values) for key, values in seconds.items()}


def _seconds(moment: int, clock: ClockSync) -> float:
    return clock.convert(moment) / 1e9
