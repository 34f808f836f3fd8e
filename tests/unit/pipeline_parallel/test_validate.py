"""The validator against schedules broken by hand, and against a machine that posts receives."""

from collections import Counter, deque
from typing import NamedTuple

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline_parallel.schedule.schedules import SCHEDULES, Action, Kind, forward_only
from pipeline_parallel.schedule.validate import check_schedule, peak_in_flight, peak_recomputed
from tests.support.orders import actions_of, schedule_of
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
    "no backward": Broken(["F0 F1 B0 B1", "F0 F1 B1"], "stage 1, B0: never runs, nor do I0 and W0"),
    "evaluation": Broken(["F0 F1", "F0 F1"], "stage 0, B0: never runs, nor do I0 and W0"),
    "no W": Broken(["F0 F1 B0 B1", "F0 F1 I0 I1 W1"], "stage 1, W0: never runs"),
    "no I": Broken(["F0 F1 B0 B1", "F0 F1 I0 W0 W1"], "stage 1, I1: never runs"),
    "two F": Broken(["F0 F1 B0 F0 B1", "F0 F1 B0 B1"], "stage 0, F0: runs twice"),
    "two W": Broken(["F0 I0 W0 W0"], "stage 0, W0: runs twice", 1),
    "B and I": Broken(["F0 F1 B0 I0 B1"], "stage 0, I0: runs although B0 does all of backward"),
    "B and W": Broken(["F0 F1 B0 B1 W1"], "stage 0, W1: runs although B1 does all of backward"),
    "W before I": Broken(["F0 F1 I0 W1 I1 W0"], "stage 0, W1: runs before I1"),
    "backward first": Broken(["B0 F0 F1 B1", "F0 F1 B0 B1"], "stage 0, B0: runs before F0"),
    "one too many": Broken(["F0 F1 B0 B1 F2 B2"], "stage 0, F2: the microbatches are 0 to 1"),
    "below zero": Broken(["F0 B0 F-1"], "stage 0, F-1: the microbatches are 0 to 0", 1),
    "activations overtake": Broken(
        ["F0 F1 B0 B1", "F1 F0 B0 B1"],
        "stage 1, F1: would be given the message of F0 of stage 0, which is sent earlier",
    ),
    "gradients overtake": Broken(
        ["F0 F1 B1 B0", "F0 F1 I0 I1 W0 W1"],
        "stage 0, B1: would be given the message of I0 of stage 1, which is sent earlier",
    ),
    "another order of sums": Broken(
        ["F0 F1 I0 I1 W0 W1", "F0 F1 I0 I1 W1 W0"],
        "stage 1, W1: stage 0 has W0 in its place: gradients would add up in another order",
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


class Machine:
    """Stages that post their next `ahead` receives, in their order, before they need them.

    A message moves from its sender's queue only into a posted receive, whatever that was meant for.
    """

    def __init__(self, orders: list[list[Action]], ahead: int) -> None:
        self.orders, self.ahead = orders, ahead
        self.position = [0] * len(orders)
        links = [(a, b) for a in range(len(orders)) for b in (a - 1, a + 1)]
        self.sent: dict[tuple[int, int], deque[int]] = {link: deque() for link in links}
        self.received: dict[tuple[int, int], deque[int]] = {link: deque() for link in links}

    def source(self, stage: int, action: Action) -> int | None:
        if action.kind is Kind.WEIGHT_GRADIENT:
            return None
        source = stage - 1 if action.kind is Kind.FORWARD else stage + 1
        return source if 0 <= source < len(self.orders) else None

    def post(self, stage: int) -> None:
        coming = self.orders[stage][self.position[stage] :]
        sources = [s for s in (self.source(stage, action) for action in coming) if s is not None]
        for source, posted in Counter(sources[: self.ahead]).items():
            link = (source, stage)
            while self.sent[link] and len(self.received[link]) < posted:
                self.received[link].append(self.sent[link].popleft())

    def step(self, stage: int) -> bool:
        """Runs one action, if it can; AssertionError where it is given another's message."""
        self.post(stage)
        if self.position[stage] == len(self.orders[stage]):
            return False
        action = self.orders[stage][self.position[stage]]
        source = self.source(stage, action)
        if source is not None:
            if not self.received[source, stage]:
                return False
            assert self.received[source, stage].popleft() == action.microbatch
        self.position[stage] += 1
        if action.kind is not Kind.WEIGHT_GRADIENT:
            to = stage + 1 if action.kind is Kind.FORWARD else stage - 1
            self.sent[stage, to].append(action.microbatch)
        return True

    def runs(self) -> bool:
        try:
            while any(self.step(stage) for stage in range(len(self.orders))):
                pass
        except AssertionError:
            return False
        return self.position == [len(order) for order in self.orders]


@st.composite
def drawn_order(draw: st.DrawFn, microbatches: int) -> str:
    """A stage's actions that are right in themselves; some are swapped, where that stays so."""
    left = [[f"{kind}{m}" for m in range(microbatches)] for kind in "FIW"]
    order: list[str] = []
    while any(left):
        can = [k for k in range(3) if left[k] and (k == 0 or len(left[k]) > len(left[k - 1]))]
        order.append(left[draw(st.sampled_from(can))].pop(0))
    other = draw(st.permutations(order)) if draw(st.integers(0, 7)) == 0 else order
    good = all(
        other.index(f"F{m}") < other.index(f"I{m}") < other.index(f"W{m}")
        for m in range(microbatches)
    )
    return " ".join(other if good else order)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_what_passes_runs_however_far_ahead_receives_are_posted(data: st.DataObject) -> None:
    microbatches, stages = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 3))
    lines = [data.draw(drawn_order(microbatches)) for _ in range(stages)]
    fault = fault_of(lines, microbatches)
    assume("gradients would add up" not in fault)  # which is no matter of messages
    orders = [actions_of(line) for line in lines]
    assert {Machine(orders, ahead).runs() for ahead in (1, 2, 99)} == {not fault}


def test_the_machine_tells_a_run_from_a_deadlock_and_from_garbage() -> None:
    for ahead in (1, 2, 99):
        assert Machine([actions_of("F0 F1 B0 B1")] * 2, ahead).runs()
        for name in ("deadlock", "deadlock of other stages", "activations overtake"):
            assert not Machine([actions_of(line) for line in BROKEN[name].lines], ahead).runs()


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
