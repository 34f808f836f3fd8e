import json

import pytest

from monitor.profiling.step_trace import (
    RankSpan,
    StepOfAllRanks,
    compute_costs,
    join_step,
    median_step,
    step_rows,
    step_times,
)
from monitor.profiling.tracer import Span, StepTrace, Track
from tests.support.clocks import clock_from

MEDIANS = {
    "odd": ([[[1, 0.0, 9.0], [2, 9.0, 11.0], [3, 11.0, 14.0]]], 3),
    "even: the shorter middle": ([[[1, 0, 1], [2, 1, 3], [3, 3, 6], [4, 6, 10]]], 2),
    "of two ranks, from the first begin to the last end": (
        [[[1, 0, 2], [2, 2, 3], [3, 5, 9]], [[1, 1, 2], [2, 0, 3], [3, 5, 9]]],
        2,
    ),
    "only what all ranks have": ([[[1, 0, 5], [2, 5, 6]], [[2, 5, 6], [3, 6, 9]]], 2),
    "nothing in common": ([[[1, 0, 5]], []], None),
}


@pytest.mark.parametrize(("times", "expected"), MEDIANS.values(), ids=MEDIANS.keys())
def test_the_median_step(times: list[list[list[float]]], expected: int | None) -> None:
    assert median_step(times) == expected


def test_a_step_travels_as_json() -> None:
    first = StepTrace(4, 10**9, 3 * 10**9, [Span(Track.OPTIMIZER_COMP, 2 * 10**9, 3 * 10**9)])
    second = StepTrace(4, 2 * 10**9, 4 * 10**9, [Span(Track.FORWARD_RECV, 2 * 10**9, 10**10, 5)])
    other = StepTrace(5, 3 * 10**9, 10**10, [Span(Track.FORWARD_SEND, 0, 1)])
    clock = clock_from(10**9)
    traces = [[first, other], [second, other]]
    times = json.loads(json.dumps([step_times(steps, clock) for steps in traces]))
    rows = json.loads(
        json.dumps([step_rows(steps, 4, rank=r, clock=clock) for r, steps in enumerate(traces)])
    )
    spans = [
        RankSpan(0, Track.OPTIMIZER_COMP, None, 1.0, 2.0),
        RankSpan(1, Track.FORWARD_RECV, 5, 1.0, 9.0),
    ]
    assert join_step(4, times, rows) == StepOfAllRanks(4, 0.0, 3.0, spans)


def test_costs_are_medians_of_a_stage_over_its_replicas() -> None:
    spans = [
        RankSpan(rank, Track.FORWARD_COMPUTE, i, 0.0, seconds)
        for rank, i, seconds in [(1, 0, 9.0), (1, 1, 2.0), (3, 0, 1.0), (0, 0, 5.0)]
    ]
    spans.append(RankSpan(1, Track.FORWARD_RECV, 0, 0.0, 100.0))
    assert compute_costs(spans, num_stages=2) == {
        (0, Track.FORWARD_COMPUTE): 5.0,
        (1, Track.FORWARD_COMPUTE): 2.0,
    }
