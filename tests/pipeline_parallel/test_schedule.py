"""Schedules against literal tables."""

from __future__ import annotations

from pipeline_parallel.schedule import SCHEDULES, forward_only, gpipe


def test_gpipe_is_its_table() -> None:
    for stage in range(3):
        assert " ".join(map(str, gpipe(stage, 3, 3))) == "F0 F1 F2 B0 B1 B2"
    assert " ".join(map(str, gpipe(0, 1, 2))) == "F0 F1 B0 B1"


def test_evaluation_runs_forwards_alone() -> None:
    assert " ".join(map(str, forward_only(1, 2, 3))) == "F0 F1 F2"


def test_every_schedule_runs_each_microbatch_once_each_way() -> None:
    for schedule in SCHEDULES.values():
        for stages in (1, 2, 4):
            for stage in range(stages):
                actions = [str(action) for action in schedule(stage, stages, 5)]
                assert sorted(actions) == sorted([f"{k}{m}" for k in "FB" for m in range(5)])
                assert all(actions.index(f"F{m}") < actions.index(f"B{m}") for m in range(5))
                backwards = [action for action in actions if action[0] == "B"]
                assert backwards == [f"B{m}" for m in range(5)], "one order, whatever P"
