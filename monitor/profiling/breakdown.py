"""Breakdown of a step's time on each rank: work, exposed communication, and bubble.

Communication is exposed while a rank does no work and

- sends a message; or
- waits for a message that its neighbour has already computed; or
- exchanges gradients, weights or totals (track optimizer-comm), after the backwards of all ranks.

All other time without work is the bubble: the rank waits for another rank's computation, or runs
code that no span (measured interval) covers. A step can also be simulated; the simulation has no
spans of messages, so a gap before a forward or backward counts as the receive of its input.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from monitor.profiling.step_trace import RankSpan
from monitor.profiling.tracer import PIPELINE_WORK, Track

Interval = tuple[float, float]

WORK = (*PIPELINE_WORK, Track.OPTIMIZER_COMP)

_SENDS = (Track.FORWARD_SEND, Track.BACKWARD_SEND)
# The offset from this stage to the sender's stage, and the computation that makes the message.
_RECEIVES = {
    Track.FORWARD_RECV: (-1, Track.FORWARD_COMPUTE),
    Track.BACKWARD_RECV: (1, Track.BACKWARD_COMPUTE),
}
_OF_LABEL = {
    "F": (Track.FORWARD_COMPUTE, Track.FORWARD_RECV),
    "B": (Track.BACKWARD_COMPUTE, Track.BACKWARD_RECV),
    "I": (Track.BACKWARD_COMPUTE, Track.BACKWARD_RECV),
    "W": (Track.WEIGHT_GRADIENT, None),
}


class SimulatedSpan(NamedTuple):
    """A simulated action of a stage; label F3 is forward of microbatch 3. Times are in seconds."""

    stage: int
    label: str
    start: float
    end: float


@dataclass
class RankBreakdown:
    """One step of a rank: its work and its exposed communication; the remaining time is bubble."""

    work: list[RankSpan] = field(default_factory=list)
    communication: list[Interval] = field(default_factory=list)


class Shares(NamedTuple):
    """Fractions of the time that all ranks together spend in a step; the fractions sum to 1."""

    compute: float
    communication: float
    bubble: float


def breakdown_by_rank(
    spans: Sequence[RankSpan], *, num_stages: int, num_ranks: int
) -> list[RankBreakdown]:
    """Returns the breakdown of each rank, in the order of the ranks."""
    compute_ends = {
        (s.rank, s.track, s.microbatch): s.end for s in spans if s.track in PIPELINE_WORK
    }
    last_backward = max(compute_ends.values(), default=0.0)
    breakdowns = [RankBreakdown() for _ in range(num_ranks)]
    waits: list[list[Interval]] = [[] for _ in range(num_ranks)]
    for span in spans:
        if span.track in WORK:
            breakdowns[span.rank].work.append(span)
        else:
            ready = _ready(span, compute_ends, last_backward, num_stages)
            waits[span.rank].append((max(span.start, ready), span.end))
    for rank, of_rank in zip(breakdowns, waits, strict=True):
        rank.communication = subtract(union(of_rank), union((s.start, s.end) for s in rank.work))
    return breakdowns


def shares(breakdowns: Sequence[RankBreakdown], *, start: float, end: float) -> Shares:
    """Returns the shares of work, communication and bubble from `start` to `end` (seconds)."""
    total = (end - start) * len(breakdowns)
    work = sum(_length(union((s.start, s.end) for s in rank.work)) for rank in breakdowns)
    communication = sum(_length(rank.communication) for rank in breakdowns)
    return Shares(work / total, communication / total, 1 - (work + communication) / total)


def simulated_spans(actions: Iterable[SimulatedSpan]) -> list[RankSpan]:
    """Returns the spans of a simulated timeline; a gap before forward or backward is a receive."""
    spans: list[RankSpan] = []
    free_since: dict[int, float] = {}
    for action in sorted(actions, key=lambda action: action.start):
        work, receive = _OF_LABEL[action.label[0]]
        microbatch, since = int(action.label[1:]), free_since.get(action.stage, 0.0)
        if receive is not None and since < action.start:
            spans.append(RankSpan(action.stage, receive, microbatch, since, action.start))
        spans.append(RankSpan(action.stage, work, microbatch, action.start, action.end))
        free_since[action.stage] = action.end
    return spans


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the union of the intervals as sorted intervals that do not touch."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """Returns `intervals` without the times in `others`; both arguments must come from `union`."""
    left: list[Interval] = []
    for start, end in intervals:
        for other_start, other_end in others:
            if start < other_start < end:
                left.append((start, other_start))
            if other_start < end:
                start = max(start, other_end)
        if start < end:
            left.append((start, end))
    return left


def _ready(
    span: RankSpan,
    compute_ends: dict[tuple[int, Track, int | None], float],
    last_backward: float,
    num_stages: int,
) -> float:
    """Returns the time from which a span is communication; before, it waits for a computation."""
    if span.track in _SENDS:
        return span.start
    if span.track is Track.OPTIMIZER_COMM:
        return last_backward
    step, track = _RECEIVES[span.track]
    stage = span.rank % num_stages + step
    if not 0 <= stage < num_stages:  # the first and last stage have one neighbour
        return span.end
    return compute_ends.get((span.rank + step, track, span.microbatch), span.start)


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
