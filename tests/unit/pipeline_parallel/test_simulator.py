"""Tests simulated times against formulas, a table made by hand, and a longest-path search."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_parallel.schedule.schedules import SCHEDULES, Kind, Schedule
from pipeline_parallel.schedule.simulator import Costs, SimulatedRun, StageCosts, simulate
from tests.support.orders import schedule_of

SLOTS = st.integers(1, 5)


def even(mode: str, p: int, m: int, f: float, i: float, w: float) -> SimulatedRun:
    return simulate(SCHEDULES[mode], p, m, Costs([StageCosts(f, i, w)] * p))


@pytest.mark.parametrize("mode", ["gpipe", "1f1b"])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(1, 12), SLOTS, SLOTS, SLOTS)
def test_gpipe_and_1f1b_take_m_and_p_less_one_turns(
    mode: str, p: int, m: int, f: int, i: int, w: int
) -> None:
    run = even(mode, p, m, f, i, w)
    assert run.total == (m + p - 1) * (f + i + w)
    assert run.bubble == pytest.approx((p - 1) / (m + p - 1))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 6), st.integers(0, 8), SLOTS, SLOTS, SLOTS)
def test_zb_h1_idles_as_its_paper_says(p: int, more: int, f: int, i: int, w: int) -> None:
    """Each of p stages of zb-h1 waits (p - 1)(f + i - min(f, i, w)) slots in a step.

    A forward takes f slots, an input gradient i and a weight gradient w. In the paper, w is the
    smallest of the three.
    """
    m = p + more
    run = even("zb-h1", p, m, f, i, w)
    assert run.total - m * (f + i + w) == (p - 1) * (f + i - min(f, i, w))
    if w <= min(f, i):
        assert run.total - m * (f + i + w) == (p - 1) * (f + i - w)
    assert run.total <= even("1f1b", p, m, f, i, w).total


def test_zb_h1_is_never_behind_1f1b_with_few_microbatches() -> None:
    for p in range(2, 7):
        for m in range(1, p):
            assert even("zb-h1", p, m, 1, 1, 1).total < even("1f1b", p, m, 1, 1, 1).total


def test_backward_may_cost_less_than_its_parts() -> None:
    costs = Costs([StageCosts(1, 1, 1, backward=1.5)] * 2)
    assert simulate(SCHEDULES["gpipe"], 2, 3, costs).total == (3 + 2 - 1) * 2.5
    assert simulate(SCHEDULES["zb-h1"], 2, 3, costs).total == 3 * 3 + 1


def test_actions_are_a_timetable_with_messages_on_their_way() -> None:
    """Times equal a table made by hand; messages take 0.5 s (activations) or 0.25 s (gradients)."""
    costs = Costs([StageCosts(1, 1, 1)] * 2, activation_seconds=0.5, gradient_seconds=0.25)
    run = simulate(SCHEDULES["1f1b"], 2, 2, costs)
    expected = [
        ["F0 0 1", "F1 1 2", "B0 4.75 6.75", "B1 7.75 9.75"],
        ["F0 1.5 2.5", "B0 2.5 4.5", "F1 4.5 5.5", "B1 5.5 7.5"],
    ]
    for stage, actions in enumerate(expected):
        found = [f"{s.action} {s.start:g} {s.end:g}" for s in run.actions if s.stage == stage]
        assert found == actions
    assert run.total == 9.75
    assert run.bubble == pytest.approx(1 - 12 / (2 * 9.75))
    assert run.peak_in_flight == (2, 1)


def longest_path(schedule: Schedule, num_stages: int, microbatches: int, costs: Costs) -> float:
    """Returns a step's duration, which is the longest path through its actions and messages."""
    Node = tuple[int, str, int]
    seconds: dict[Node, float] = {}
    edges: list[tuple[Node, Node]] = []
    for stage in range(num_stages):
        actions = list(schedule(stage, num_stages, microbatches))
        nodes = [(stage, a.kind.value, a.microbatch) for a in actions]
        seconds |= {n: costs.stages[stage][a.kind] for n, a in zip(nodes, actions, strict=True)}
        edges += pairwise(nodes)
        for kinds, to, link in (("F", stage + 1, "f"), ("BI", stage - 1, "g")):
            if not 0 <= to < num_stages:
                continue
            starts = [n for n in nodes if n[1] in kinds]
            sends = [(stage, link, n[2]) for n in starts]
            takes = costs.activation_seconds if link == "f" else costs.gradient_seconds
            of_link = takes[min(stage, to)] if isinstance(takes, Sequence) else takes
            seconds |= dict.fromkeys(sends, of_link)
            edges += [*zip(starts, sends, strict=True), *pairwise(sends)]
            edges += [(send, (to, kind, send[2])) for send in sends for kind in kinds]
    edges = [(a, b) for a, b in edges if b in seconds]
    end = dict(seconds)
    while late := [(a, b) for a, b in edges if end[b] < end[a] + seconds[b]]:
        for a, b in late:
            end[b] = max(end[b], end[a] + seconds[b])
    return max(end.values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 5), st.integers(1, 8), st.data())
def test_any_costs_end_at_the_longest_path(
    mode: str, stages: int, microbatches: int, data: st.DataObject
) -> None:
    some = st.integers(0, 9)
    messages = some | st.lists(some, min_size=stages - 1, max_size=stages - 1)
    costs = Costs(
        [StageCosts(*data.draw(st.tuples(some, some, some))) for _ in range(stages)],
        activation_seconds=data.draw(messages),
        gradient_seconds=data.draw(messages),
    )
    run = simulate(SCHEDULES[mode], stages, microbatches, costs)
    assert run.total == longest_path(SCHEDULES[mode], stages, microbatches, costs)
    assert 0 <= run.bubble < 1
    for stage in range(stages):
        of_stage = [action for action in run.actions if action.stage == stage]
        assert all(a.end <= b.start for a, b in pairwise(of_stage)), "one action at a time"


def test_costs_of_nothing_have_no_bubble() -> None:
    run = even("gpipe", 3, 2, 0, 0, 0)
    assert (run.total, run.bubble) == (0, 0)


def test_costs_are_looked_up_by_kind() -> None:
    costs = StageCosts(1, 2, 4)
    assert [costs[kind] for kind in Kind] == [1, 6, 2, 4]
    assert StageCosts(1, 2, 4, backward=5)[Kind.BACKWARD] == 5


@pytest.mark.parametrize(
    ("stages", "messages", "says"),
    [
        ([StageCosts(1, -1, 1)], (0, 0), "stage 0, input_gradient: .* at least 0, got -1"),
        ([StageCosts(1, 1, 1), StageCosts(math.nan, 1, 1)], (0, 0), "stage 1, forward: .* got nan"),
        ([StageCosts(1, 1, 1, math.inf)], (0, 0), "stage 0, backward: .* got inf"),
        ([StageCosts(1, 1, 1)], (-1, 0), "activation_seconds: .* got -1"),
        ([StageCosts(1, 1, 1)], (0, -1), "gradient_seconds: .* got -1"),
        ([StageCosts(1, 1, 1)] * 3, (0, (1, -1)), "gradient_seconds: .* got -1"),
        ([StageCosts(1, 1, 1)] * 3, ((1,), 0), "activation_seconds: expected 2 numbers, .* got 1"),
    ],
)
def test_costs_that_are_no_times_are_refused(
    stages: list[StageCosts], messages: tuple[Any, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Costs(stages, *messages)


def test_what_cannot_be_simulated_is_refused() -> None:
    costs = Costs([StageCosts(1, 1, 1)] * 2)
    with pytest.raises(ValueError, match="expected the costs of 3 stages, got 2"):
        simulate(SCHEDULES["gpipe"], 3, 4, costs)
    with pytest.raises(ValueError, match=r"^deadlock: stage 0 waits before B0 .* while stage 1 "):
        simulate(schedule_of(["F0 B0 F1 B1", "F0 F1 B0 B1"]), 2, 2, costs)
    with pytest.raises(ValueError, match="stage 1, F1: waits for the activation of microbatch 1 "):
        simulate(schedule_of(["F0 B0", "F0 B0 F1"]), 2, 2, costs)
