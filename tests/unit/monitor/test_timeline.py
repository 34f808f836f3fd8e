"""Tests a timeline of two stages and two microbatches against numbers calculated by hand.

A forward takes 1 s, a backward 2 s, a message between stages 0.5 s. Below, F1 1-2 is the forward of
microbatch 1 from second 1 to second 2; B is a backward. In the exchange, a rank waits until the
last backward of all ranks has ended, at second 10; then replicas sum gradients, which takes 1 s.

    stage 0   F0 0-1, F1 1-2     B0 6-8, B1 8-10     exchange 10-11, update 11-12
    stage 1   F0 1.5-2.5, F1 2.5-3.5, B0 3.5-5.5, B1 5.5-7.5  exchange 7.5-11, update 11-12
"""

from pathlib import Path
from typing import Any

import pytest

from monitor.profiling.breakdown import (
    Interval,
    Shares,
    SimulatedSpan,
    breakdown_by_rank,
    shares,
    simulated_spans,
    subtract,
    union,
)
from monitor.profiling.step_trace import RankSpan, StepOfAllRanks
from monitor.profiling.timeline import Timeline, draw_timeline, timeline_figure
from monitor.profiling.tracer import Track

F, B, W = Track.FORWARD_COMPUTE, Track.BACKWARD_COMPUTE, Track.WEIGHT_GRADIENT

PIPELINE = [
    RankSpan(0, F, 0, 0.0, 1.0),
    RankSpan(0, Track.FORWARD_SEND, 0, 1.0, 1.0),
    RankSpan(0, F, 1, 1.0, 2.0),
    RankSpan(0, Track.BACKWARD_RECV, 0, 2.0, 6.0),
    RankSpan(0, B, 0, 6.0, 8.0),
    RankSpan(0, Track.BACKWARD_RECV, 1, 8.0, 8.0),
    RankSpan(0, B, 1, 8.0, 10.0),
    RankSpan(1, Track.FORWARD_RECV, 0, 0.0, 1.5),
    RankSpan(1, F, 0, 1.5, 2.5),
    RankSpan(1, F, 1, 2.5, 3.5),
    RankSpan(1, B, 0, 3.5, 5.5),
    RankSpan(1, B, 1, 5.5, 7.5),
]
UPDATE = [
    RankSpan(0, Track.OPTIMIZER_COMM, None, 10.0, 11.0),
    RankSpan(1, Track.OPTIMIZER_COMM, None, 7.5, 11.0),
    RankSpan(0, Track.OPTIMIZER_COMP, None, 11.0, 12.0),
    RankSpan(1, Track.OPTIMIZER_COMP, None, 11.0, 12.0),
]
SIMULATED = [
    SimulatedSpan(span.rank, f"{'F' if span.track is F else 'B'}{span.microbatch}", *span[3:])
    for span in PIPELINE
    if span.track in (F, B)
]


def timeline(simulated: list[SimulatedSpan], *, num_replicas: int = 1) -> Timeline:
    copies = [
        span._replace(rank=span.rank + 2 * replica)
        for replica in range(num_replicas)
        for span in PIPELINE + UPDATE
    ]
    return Timeline(StepOfAllRanks(57, 0.0, 12.0, copies), simulated, "gpipe", 2, num_replicas, 2)


def test_what_is_communication() -> None:
    found = breakdown_by_rank(PIPELINE + UPDATE, num_stages=2, num_ranks=2)
    assert found[0].communication == [(5.5, 6.0), (10.0, 11.0)]
    assert found[1].communication == [(1.0, 1.5), (10.0, 11.0)]


def test_the_shares_on_paper() -> None:
    drawn = timeline(SIMULATED)
    assert drawn.measured_shares() == pytest.approx(Shares(14 / 24, 3 / 24, 7 / 24))
    assert drawn.simulated_shares() == pytest.approx(Shares(12 / 20, 1 / 20, 7 / 20))
    assert timeline([], num_replicas=3).measured_shares() == pytest.approx(drawn.measured_shares())


def test_communication_under_work_is_not_exposed() -> None:
    spans = [
        RankSpan(0, B, 0, 0.0, 4.0),
        RankSpan(0, Track.OPTIMIZER_COMM, None, 3.0, 6.0),
        RankSpan(0, Track.OPTIMIZER_COMM, None, 4.0, 5.0),
        RankSpan(0, Track.OPTIMIZER_COMP, None, 5.5, 8.0),
    ]
    [rank] = breakdown_by_rank(spans, num_stages=1, num_ranks=1)
    assert rank.communication == [(4.0, 5.5)]
    assert shares([rank], start=0.0, end=10.0) == pytest.approx(Shares(0.65, 0.15, 0.2))


def test_a_send_that_blocks_is_communication() -> None:
    spans = [RankSpan(0, F, 0, 0.0, 1.0), RankSpan(0, Track.FORWARD_SEND, 0, 1.0, 3.0)]
    assert breakdown_by_rank(spans, num_stages=2, num_ranks=2)[0].communication == [(1.0, 3.0)]


def test_a_simulated_stage_waits_where_it_does_nothing() -> None:
    actions = [
        SimulatedSpan(0, "I0", 5.0, 6.0),
        SimulatedSpan(0, "W0", 7.0, 8.0),
        SimulatedSpan(1, "F10", 1.0, 2.0),
    ]
    assert simulated_spans(actions) == [
        RankSpan(1, Track.FORWARD_RECV, 10, 0.0, 1.0),
        RankSpan(1, F, 10, 1.0, 2.0),
        RankSpan(0, Track.BACKWARD_RECV, 0, 0.0, 5.0),
        RankSpan(0, B, 0, 5.0, 6.0),
        RankSpan(0, W, 0, 7.0, 8.0),
    ]


INTERVALS: list[tuple[list[Interval], list[Interval], list[Interval]]] = [
    ([(0, 4)], [], [(0, 4)]),
    ([(0, 4)], [(0, 4)], []),
    ([(0, 4)], [(1, 2), (3, 5)], [(0, 1), (2, 3)]),
    ([(0, 2), (3, 9)], [(1, 4), (5, 6)], [(0, 1), (4, 5), (6, 9)]),
    ([(3, 4)], [(0, 1), (6, 7)], [(3, 4)]),
    ([(3, 4)], [(0, 9)], []),
]


@pytest.mark.parametrize(("left", "right", "expected"), INTERVALS)
def test_subtraction(left: list[Interval], right: list[Interval], expected: list[Interval]) -> None:
    assert subtract(left, right) == expected


def test_union_drops_what_is_empty_and_joins_what_meets() -> None:
    intervals: list[Interval] = [(5, 6), (1, 1), (2, 3), (3, 4), (0, 1), (7, 2), (5.5, 5.7)]
    assert union(intervals) == [(0, 1), (2, 4), (5, 6)]


def boxes(axes: Any) -> list[tuple[float, float]]:
    return [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]


def test_the_boxes() -> None:
    figure = timeline_figure(timeline(SIMULATED))
    measured, simulated = figure.axes
    assert len(measured.patches) == 2 + 10 + 4  # rows, work, communication
    assert len(simulated.patches) == 2 + 8 + 2
    assert boxes(measured)[0] == (0.0, 12_000.0)
    assert boxes(simulated)[0] == (0.0, 10_000.0)
    assert (5500.0, 6000.0) in boxes(measured)
    assert [text.get_text() for text in measured.texts] == list("01010101")
    assert len(timeline_figure(timeline([], num_replicas=3)).axes) == 1
    assert len(timeline_figure(timeline([], num_replicas=3)).axes[0].patches) == 3 * 16


def test_the_words() -> None:
    figure = timeline_figure(timeline(SIMULATED))
    assert figure.get_suptitle() == "gpipe, 2 stages x 1 replica, 2 microbatches: step 57"
    measured, simulated = figure.axes
    assert measured.get_title(loc="left") == ("measured: 12000.0 ms, of which pipeline 10000.0 ms")
    told = ["compute 58.3%", "exposed communication 12.5%", "bubble 29.2%"]
    assert measured.get_title(loc="right").split("    ") == told
    assert "bubble 35.0%" in simulated.get_title(loc="right")
    assert "measured pipeline 1.000 x as long" in simulated.get_title(loc="left")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:4] == ["forward", "backward", "optimizer", "exposed communication"]


def test_the_simulation_begins_with_the_first_forward() -> None:
    later = [span._replace(start=span.start + 3, end=span.end + 3) for span in PIPELINE]
    step = StepOfAllRanks(1, 1.0, 13.0, later)
    figure = timeline_figure(Timeline(step, SIMULATED, "gpipe", 2, 1, 2))
    measured, simulated = map(boxes, figure.axes)
    assert (2000.0, 3000.0) in measured
    assert simulated[0] == (2000.0, 12_000.0)
    assert (2000.0, 3000.0) in simulated


def test_the_picture_is_1400_pixels_wide_and_a_failure_is_a_warning(
    tmp_path: Path, caplog: Any
) -> None:
    draw_timeline(timeline(SIMULATED), tmp_path / "timeline.png")
    picture = (tmp_path / "timeline.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == 1400  # the width in PNG's header
    assert caplog.text == ""
    draw_timeline(timeline(SIMULATED), tmp_path / "no such folder" / "timeline.png")
    assert "no such folder" in caplog.text


def test_two_digits_fit_into_each_of_many_boxes() -> None:
    spans = [RankSpan(0, F, i % 100, 10.0 * i, 10.0 * i + 10.0) for i in range(120)]
    step = StepOfAllRanks(1, 0.0, 1200.0, spans)
    figure = timeline_figure(Timeline(step, [], "gpipe", 1, 1, 100))
    assert len(figure.axes[0].texts) == 120
