"""What the time of a step goes to, rank by rank: work, exposed communication, or nothing at all.

Communication is exposed where a rank does no work and

- is sending; or
- waits for a message that its neighbour has finished computing (before that, the neighbour has
  nothing to send, and no network would be fast enough); or
- is in optimizer-comm after the last rank of all has ended its last backward.

Everything else without work is the bubble: waiting for others to compute, and the host's own time
between two spans. Sum over all ranks, these are the shares of ranks x step. The simulator's
timeline has no spans of messages; its gaps are taken as waiting for what is computed next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from monitor.profiling.step_trace import RankSpan
from monitor.profiling.tracer import Track

Interval = tuple[float, float]

PIPELINE_WORK = (Track.FORWARD_COMPUTE, Track.BACKWARD_COMPUTE, Track.WEIGHT_GRADIENT)
WORK = (*PIPELINE_WORK, Track.OPTIMIZER_COMP)

_SENDS = (Track.FORWARD_SEND, Track.BACKWARD_SEND)
# Where a message comes from, in stages, and what the neighbour must have computed for it.
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
    """An action of a simulated stage, `F3`, `B3`, `I3` or `W3`, in seconds."""

    stage: int
    label: str
    start: float
    end: float


@dataclass
class RankBreakdown:
    """A rank's step: its work, and when its communication is exposed; the rest is the bubble."""

    work: list[RankSpan] = field(default_factory=list)
    communication: list[Interval] = field(default_factory=list)


class Shares(NamedTuple):
    """Parts of ranks x step; they sum to 1."""

    compute: float
    communication: float
    bubble: float


def breakdown_by_rank(
    spans: Sequence[RankSpan], *, num_stages: int, num_ranks: int
) -> list[RankBreakdown]:
    """The lane of each rank."""
    computed = {(s.rank, s.track, s.microbatch): s.end for s in spans if s.track in PIPELINE_WORK}
    last_backward = max(computed.values(), default=0.0)
    found = [RankBreakdown() for _ in range(num_ranks)]
    waits: list[list[Interval]] = [[] for _ in range(num_ranks)]
    for span in spans:
        if span.track in WORK:
            found[span.rank].work.append(span)
        else:
            ready = _ready(span, computed, last_backward, num_stages)
            waits[span.rank].append((max(span.start, ready), span.end))
    for lane, of_rank in zip(found, waits, strict=True):
        lane.communication = subtract(union(of_rank), union((s.start, s.end) for s in lane.work))
    return found


def shares(of_ranks: Sequence[RankBreakdown], *, start: float, end: float) -> Shares:
    """What the time from `start` to `end` of all ranks goes to."""
    whole = (end - start) * len(of_ranks)
    work = sum(_length(union((s.start, s.end) for s in lane.work)) for lane in of_ranks)
    communication = sum(_length(lane.communication) for lane in of_ranks)
    return Shares(work / whole, communication / whole, 1 - (work + communication) / whole)


def simulated_spans(actions: Iterable[SimulatedSpan]) -> list[RankSpan]:
    """A simulated timeline as spans, with a receive for each time that a stage waits."""
    spans: list[RankSpan] = []
    free: dict[int, float] = {}
    for action in sorted(actions, key=lambda action: action.start):
        work, receive = _OF_LABEL[action.label[0]]
        microbatch, since = int(action.label[1:]), free.get(action.stage, 0.0)
        if receive is not None and since < action.start:
            spans.append(RankSpan(action.stage, receive, microbatch, since, action.start))
        spans.append(RankSpan(action.stage, work, microbatch, action.start, action.end))
        free[action.stage] = action.end
    return spans


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same times in order, no two intervals meeting."""
    merged: list[Interval] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def subtract(intervals: Sequence[Interval], others: Sequence[Interval]) -> list[Interval]:
    """The times of `intervals` that are in none of `others`; both as `union` gives them."""
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
    computed: dict[tuple[int, Track, int | None], float],
    last_backward: float,
    num_stages: int,
) -> float:
    """From when on nobody's computing is waited for in a span of communication."""
    if span.track in _SENDS:
        return span.start
    if span.track is Track.OPTIMIZER_COMM:
        return last_backward
    step, track = _RECEIVES[span.track]
    stage = span.rank % num_stages + step
    if not 0 <= stage < num_stages:  # an end of the pipeline has no neighbour to wait for
        return span.end
    return computed.get((span.rank + step, track, span.microbatch), span.start)


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
