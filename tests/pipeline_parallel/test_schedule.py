"""Schedules against literal tables, and against the timetables drawn above them."""

from pathlib import Path

import pytest

from pipeline_parallel.schedule import schedules as module
from pipeline_parallel.schedule.__main__ import timetable
from pipeline_parallel.schedule.schedules import SCHEDULES, Schedule, forward_only
from pipeline_parallel.schedule.simulator import Costs, StageCosts, simulate

# pp-mode, stages and microbatches to the timetable where F, I and W take one slot, B two
TIMETABLES = {
    ("gpipe", 3, 3): """\
stage 0   F0 F1 F2 .  .  .  .  .  .  B0 == B1 == B2 ==
stage 1   .  F0 F1 F2 .  .  .  B0 == B1 == B2 == .  .
stage 2   .  .  F0 F1 F2 B0 == B1 == B2 == .  .  .  .
""",
    ("1f1b", 3, 4): """\
stage 0   F0 F1 F2 .  .  .  .  B0 == F3 B1 == .  B2 == .  B3 ==
stage 1   .  F0 F1 .  .  B0 == F2 B1 == F3 B2 == .  B3 == .  .
stage 2   .  .  F0 B0 == F1 B1 == F2 B2 == F3 B3 == .  .  .  .
""",
    ("zb-h1", 3, 4): """\
stage 0   F0 F1 F2 .  .  B0 == F3 B1 == B2 == B3 ==
stage 1   .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
stage 2   .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
""",
}

# what has no timetable above it: fewer microbatches than stages, one stage, one microbatch
ORDERS = {
    ("gpipe", 1, 2): ["F0 F1 B0 B1"],
    ("1f1b", 1, 2): ["F0 B0 F1 B1"],
    ("1f1b", 4, 2): ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"],
    ("zb-h1", 1, 2): ["F0 B0 F1 B1"],
    ("zb-h1", 3, 1): ["F0 B0", "F0 I0 W0", "F0 I0 W0"],
    ("zb-h1", 4, 2): [
        "F0 F1 B0 B1",
        "F0 F1 I0 I1 W0 W1",
        "F0 F1 I0 I1 W0 W1",
        "F0 I0 F1 I1 W0 W1",
    ],
}


def written(schedule: Schedule, stages: int, microbatches: int) -> list[str]:
    return [" ".join(map(str, schedule(s, stages, microbatches))) for s in range(stages)]


@pytest.mark.parametrize("case", TIMETABLES, ids=str)
def test_a_schedule_is_its_timetable(case: tuple[str, int, int]) -> None:
    mode, stages, microbatches = case
    costs = Costs([StageCosts(1, 1, 1)] * stages)
    run = simulate(SCHEDULES[mode], stages, microbatches, costs)
    assert timetable(run) == TIMETABLES[case]
    without_slots = [
        " ".join(cell for cell in line.split()[2:] if cell not in (".", "=="))
        for line in TIMETABLES[case].splitlines()
    ]
    assert written(SCHEDULES[mode], stages, microbatches) == without_slots


def test_the_timetables_are_the_comments_of_the_source() -> None:
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    drawn = [line for line in source.splitlines() if line.startswith("#   stage ")]
    tables = "".join(TIMETABLES.values()).splitlines()
    assert drawn == [f"#   {line}" for line in tables]


@pytest.mark.parametrize("case", ORDERS, ids=str)
def test_a_schedule_is_its_literal_order(case: tuple[str, int, int]) -> None:
    mode, stages, microbatches = case
    assert written(SCHEDULES[mode], stages, microbatches) == ORDERS[case]


def test_evaluation_runs_forwards_alone() -> None:
    assert written(forward_only, 2, 3) == ["F0 F1 F2", "F0 F1 F2"]


@pytest.mark.parametrize("mode", SCHEDULES)
def test_gradients_add_up_in_one_order_whatever_the_number_of_stages(mode: str) -> None:
    for stages in (1, 2, 4):
        for order in written(SCHEDULES[mode], stages, 5):
            for kinds in ("F", "BI", "BW"):
                visited = [word[1:] for word in order.split() if word[0] in kinds]
                assert visited == ["0", "1", "2", "3", "4"]
