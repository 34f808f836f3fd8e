"""Tests schedules, and the timetables in the source's comments, against tables made by hand."""

from pathlib import Path

import pytest

from pipeline_parallel.schedule import schedules as module
from pipeline_parallel.schedule.__main__ import timetable
from pipeline_parallel.schedule.schedules import SCHEDULES, Schedule, forward_only
from pipeline_parallel.schedule.simulator import Costs, StageCosts, simulate
from tests.support.schedule_tables import ORDERS, TIMETABLES


def written(schedule: Schedule, stages: int, microbatches: int) -> list[str]:
    return [" ".join(map(str, schedule(s, stages, microbatches))) for s in range(stages)]


def test_every_schedule_has_its_tables() -> None:
    for table in (TIMETABLES, ORDERS):
        assert {mode for mode, _, _ in table} == SCHEDULES.keys()


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
