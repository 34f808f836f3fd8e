"""One step of all ranks out of their traces: the median one, as small JSON lists and back."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from monitor.profiling.clock_sync import ClockSync
from monitor.profiling.tracer import StepTrace, Track


class RankSpan(NamedTuple):
    """A span of a rank, in seconds of the run's clock."""

    rank: int
    track: Track
    microbatch: int | None
    start: float
    end: float


class StepOfAllRanks(NamedTuple):
    """A step of all ranks, from when the first began it to when the last ended it, in seconds."""

    step: int
    start: float
    end: float
    spans: list[RankSpan]


def step_times(steps: Sequence[StepTrace], clock: ClockSync) -> list[list[float]]:
    """[step, start, end] of each step of this rank, in seconds of the run's clock."""
    return [[s.step, _seconds(s.begin, clock), _seconds(s.end, clock)] for s in steps]


def median_step(times: Sequence[Sequence[Sequence[float]]]) -> int | None:
    """The step of median length among those that all ranks have; `times` are all `step_times`.

    A step lasts from when the first rank begins it to when the last ends it. Of an even number of
    steps the shorter middle one is taken. None where there is no common step.
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
    """This rank's spans of one step, a list [rank, track, microbatch, start, end] for each."""
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
    """The step of all ranks, of all ranks' `step_times` and `step_rows`."""
    bounds = [row for of_rank in times for row in of_rank if row[0] == step]
    spans = [
        RankSpan(rank, Track(track), microbatch, start, end)
        for of_rank in rows
        for rank, track, microbatch, start, end in of_rank
    ]
    return StepOfAllRanks(step, min(row[1] for row in bounds), max(row[2] for row in bounds), spans)


def compute_costs(spans: Sequence[RankSpan], *, num_stages: int) -> dict[tuple[int, Track], float]:
    """The median seconds of a microbatch on each (stage, compute track), replicas taken together.

    What a simulator needs to be held against the step.
    """
    found: dict[tuple[int, Track], list[float]] = defaultdict(list)
    for span in spans:
        if span.microbatch is not None and span.track in _COSTS:
            found[span.rank % num_stages, span.track].append(span.end - span.start)
    return {key: statistics.median(seconds) for key, seconds in found.items()}


_COSTS = (Track.FORWARD_COMPUTE, Track.BACKWARD_COMPUTE, Track.WEIGHT_GRADIENT)


def _seconds(moment: int, clock: ClockSync) -> float:
    return clock.convert(moment) / 1e9
