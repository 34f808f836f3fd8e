"""Tests the schedule validator: it accepts all modes and names the fault of a broken schedule."""

from typing import NamedTuple

import pytest

from pipeline_parallel.schedule.schedules import SCHEDULES, forward_only
from pipeline_parallel.schedule.validate import check_schedule, peak_in_flight, peak_recomputed
from tests.support.orders import schedule_of
from tests.support.schedule_tables import IN_FLIGHT


def fault_of(lines: list[str], microbatches: int) -> str:
    try:
        check_schedule(schedule_of(lines), len(lines), microbatches)
    except ValueError as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("mode", SCHEDULES)
def test_every_schedule_passes(mode: str) -> None:
    for stages in range(1, 7):
        for microbatches in range(1, 13):
            check_schedule(SCHEDULES[mode], stages, microbatches)


class Broken(NamedTuple):
    lines: list[str]
    says: str
    microbatches: int = 2


BROKEN = {
    "no forward": Broken(["F0 F1 B0 B1", "F0 B0 B1"], "stage 1, F1: never runs"),
    "no backward": Broken(
        ["F0 F1 B0 B1", "F0 F1 B1"], "stage 1, B0: never runs, and I0 and W0 never run"
    ),
    "evaluation": Broken(["F0 F1", "F0 F1"], "stage 0, B0: never runs, and I0 and W0 never run"),
    "no W": Broken(["F0 F1 B0 B1", "F0 F1 I0 I1 W1"], "stage 1, W0: never runs"),
    "no I": Broken(["F0 F1 B0 B1", "F0 F1 I0 W0 W1"], "stage 1, I1: never runs"),
    "two F": Broken(["F0 F1 B0 F0 B1", "F0 F1 B0 B1"], "stage 0, F0: runs twice"),
    "two W": Broken(["F0 I0 W0 W0"], "stage 0, W0: runs twice", 1),
    "B and I": Broken(
        ["F0 F1 B0 I0 B1"], "stage 0, I0: runs, but B0 is already the complete backward"
    ),
    "B and W": Broken(
        ["F0 F1 B0 B1 W1"], "stage 0, W1: runs, but B1 is already the complete backward"
    ),
    "W before I": Broken(["F0 F1 I0 W1 I1 W0"], "stage 0, W1: runs before I1"),
    "backward first": Broken(["B0 F0 F1 B1", "F0 F1 B0 B1"], "stage 0, B0: runs before F0"),
    "one too many": Broken(["F0 F1 B0 B1 F2 B2"], "stage 0, F2: the microbatches are 0 to 1"),
    "below zero": Broken(["F0 B0 F-1"], "stage 0, F-1: the microbatches are 0 to 0", 1),
    "activations overtake": Broken(
        ["F0 F1 B0 B1", "F1 F0 B0 B1"],
        "stage 1, F1: would receive the message of F0 of stage 0, which is sent earlier",
    ),
    "gradients overtake": Broken(
        ["F0 F1 B1 B0", "F0 F1 I0 I1 W0 W1"],
        "stage 0, B1: would receive the message of I0 of stage 1, which is sent earlier",
    ),
    "another order of sums": Broken(
        ["F0 F1 I0 I1 W0 W1", "F0 F1 I0 I1 W1 W0"],
        "stage 1, W1: stage 0 runs W0 at this position: gradients would be summed in another order",
    ),
    "deadlock": Broken(
        ["F0 B0 F1 B1", "F0 F1 B0 B1"],
        "deadlock: stage 0 waits before B0 for the gradient of microbatch 0 from stage 1, while "
        "stage 1 waits before F1 for the activation of microbatch 1 from stage 0",
    ),
    "deadlock of other stages": Broken(
        ["F0 F1 B0 B1", "F0 B0 F1 B1", "F0 F1 B0 B1"],
        "deadlock: stage 1 waits before B0 for the gradient of microbatch 0 from stage 2, while "
        "stage 2 waits before F1 for the activation of microbatch 1 from stage 1",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_schedule_is_refused_by_its_fault(name: str) -> None:
    lines, says, microbatches = BROKEN[name]
    assert fault_of(lines, microbatches) == says


@pytest.mark.parametrize("size", [(0, 2), (2, 0), (-1, 1)], ids=str)
def test_a_pipeline_has_a_stage_and_a_microbatch(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 stage and 1 microbatch, got "):
        check_schedule(SCHEDULES["gpipe"], *size)


def test_stages_may_mix_whole_and_split_backwards() -> None:
    check_schedule(schedule_of(["F0 F1 B0 B1", "F0 I0 F1 W0 B1"]), 2, 2)
    check_schedule(schedule_of(["F0 F1 F2 B0 B1 B2", "F0 B0 F1 B1 F2 B2"]), 2, 3)


def test_live_microbatches_are_bounded_as_the_papers_say() -> None:
    for p in range(1, 7):
        for m in range(1, 13):
            for stage in range(p):
                for name, schedule in SCHEDULES.items():
                    assert peak_in_flight(schedule, stage, p, m) == IN_FLIGHT[name](stage, p, m)
                assert peak_in_flight(forward_only, stage, p, m) == m


def test_live_microbatches_of_an_order_written_down() -> None:
    for order, live, recomputed in (
        ("F0 B0 F1 B1", 1, 1),
        ("F0 F1 I0 F2 I1 W0 I2 W1 W2", 3, 2),
        ("F0 I0 F1 I1 W0 W1", 2, 2),
    ):
        schedule = schedule_of([order])
        assert peak_in_flight(schedule, 0, 1, 3) == live, order
        assert peak_recomputed(schedule, 0, 1, 3) == recomputed, order


def test_zb_h1_holds_recomputed_activations_of_one_more_microbatch_a_stage() -> None:
    for stage in range(4):
        assert peak_recomputed(SCHEDULES["zb-h1"], stage, 4, 8) == stage + 1
        assert peak_recomputed(SCHEDULES["1f1b"], stage, 4, 8) == 1
