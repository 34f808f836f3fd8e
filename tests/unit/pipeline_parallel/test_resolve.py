"""Tests that, in every schedule, the engine waits for a send only after its message has arrived.

So these waits are short. Lamport's happened-before relation of the calls tells the tests which
messages have arrived.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline_parallel.engine import Engine
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.p2p import AHEAD, MessageSpec
from pipeline_parallel.schedule.schedules import SCHEDULES, Schedule
from tests.support.orders import OTHER_ORDERS, schedule_of
from tests.support.pipeline_doubles import IdleStage


class NotedLink:
    """Double of `StageLink` that records the engine's calls."""

    spec = MessageSpec((1, 1, 1), torch.float32, torch.device("cpu"))

    def __init__(self, stage: int, num_stages: int) -> None:
        self.stage, self.num_stages = stage, num_stages
        self._is_first, self._is_last = stage == 0, stage == num_stages - 1
        self.calls: list[tuple[str, int, int]] = []  # call, activations, gradients

    def expect(self, *, activations: Sequence[int], gradients: Sequence[int]) -> None:
        """Does nothing, because this link posts no receives."""

    def receive_activation(self) -> Tensor | None:
        self.calls.append(("receive", 1, 0))
        return None if self._is_first else torch.zeros(1)

    def receive_gradient(self) -> Tensor | None:
        self.calls.append(("receive", 0, 1))
        return None if self._is_last else torch.zeros(1)

    def send_activation(self, activation: Tensor) -> None:
        self.calls.append(("send", 1, 0))

    def send_gradient(self, gradient: Tensor | None) -> None:
        self.calls.append(("send", 0, 1))

    def resolve(self, *, activations: int = 0, gradients: int = 0) -> None:
        self.calls.append(("resolve", activations, gradients))

    def flush(self) -> None:
        """Does nothing, because this link sends no messages."""


def calls_of(schedule: Schedule, num_stages: int, num_microbatches: int) -> list[list[Any]]:
    """Returns, for each stage, the calls that its engine makes to its link, in order."""
    found = []
    for stage in range(num_stages):
        link: Any = NotedLink(stage, num_stages)
        idle: Any = IdleStage(())
        engine = Engine(idle, link, schedule=schedule, num_microbatches=num_microbatches)
        rows = torch.zeros(num_microbatches, 2, dtype=torch.int64)
        labels = rows if stage == num_stages - 1 else None
        engine.train(PipelineBatch(rows, labels, range(num_microbatches), 1), loss_scale=1.0)
        found.append(link.calls)
    return found


def test_an_evaluation_holds_few_sends() -> None:
    """In an evaluation, a stage has at most AHEAD + 1 sends that it has not yet waited for."""
    link: Any = NotedLink(0, 2)
    idle: Any = IdleStage(())
    engine = Engine(idle, link, schedule=SCHEDULES["1f1b"], num_microbatches=20)
    engine.evaluate(PipelineBatch(torch.zeros(20, 2, dtype=torch.int64), None, (), 1))
    sent = resolved = 0
    for what, activations, _ in link.calls:
        if what == "send":
            sent += activations
        if what == "resolve":
            resolved = max(resolved, activations)
        assert sent - resolved <= AHEAD + 1


class Knowledge:
    """Vector clocks: a stage counts, for every stage, the calls that it knows to be complete.

    With each message the receiver also gets the sender's counts (Lamport's happened-before).
    """

    def __init__(self, calls: Sequence[Sequence[tuple[str, int, int]]]) -> None:
        self._calls = calls
        self._known = [[0] * len(calls) for _ in calls]
        self._sent: list[dict[str, list[list[int]]]] = [{"a": [], "g": []} for _ in calls]
        self._received: list[dict[str, int]] = [{"a": 0, "g": 0} for _ in calls]
        self.num_resolves = 0

    def play(self) -> None:
        """Simulates the calls; checks that stages wait only for sends known to have arrived."""
        moved = True
        while moved:
            moved = False
            for stage in range(len(self._calls)):
                while self._done(stage) < len(self._calls[stage]) and self._step(stage):
                    moved = True
        assert [self._done(s) for s in range(len(self._calls))] == [len(c) for c in self._calls]

    def _done(self, stage: int) -> int:
        return self._known[stage][stage]

    def _step(self, stage: int) -> bool:
        what, activations, gradients = self._calls[stage][self._done(stage)]
        kind = "a" if activations else "g"
        if what == "receive":
            source = stage - 1 if kind == "a" else stage + 1
            if 0 <= source < len(self._calls):
                number = self._received[stage][kind]
                if number == len(self._sent[source][kind]):
                    return False
                brought = self._sent[source][kind][number]
                self._known[stage] = list(map(max, self._known[stage], brought))
                self._received[stage][kind] += 1
        elif what == "resolve":
            self._check_arrived(stage, stage + 1, "a", activations)
            self._check_arrived(stage, stage - 1, "g", gradients)
        self._known[stage][stage] += 1
        if what == "send":
            self._sent[stage][kind].append(list(self._known[stage]))
        return True

    def _check_arrived(self, stage: int, neighbour: int, kind: str, count: int) -> None:
        count = min(count, len(self._sent[stage][kind]))  # only sent messages can be resolved
        if not 0 <= neighbour < len(self._calls) or count == 0:
            return
        self.num_resolves += 1
        over = self._calls[neighbour][: self._known[stage][neighbour]]
        received = over.count(("receive", 1, 0) if kind == "a" else ("receive", 0, 1))
        assert received >= count, f"stage {stage} waits for {count}, knows of {received}"


@pytest.mark.parametrize("num_microbatches", range(1, 10))
@pytest.mark.parametrize("num_stages", range(1, 6))
@pytest.mark.parametrize("mode", SCHEDULES)
def test_nothing_is_waited_for_that_cannot_have_arrived(
    mode: str, num_stages: int, num_microbatches: int
) -> None:
    knowledge = Knowledge(calls_of(SCHEDULES[mode], num_stages, num_microbatches))
    knowledge.play()
    assert (knowledge.num_resolves > 0) == (num_stages > 1)


@pytest.mark.parametrize("lines", OTHER_ORDERS)
def test_nor_in_a_schedule_of_another_order(lines: list[str]) -> None:
    """In orders that no --pp-mode uses, stages also wait for a send only after its arrival."""
    knowledge = Knowledge(calls_of(schedule_of(lines), 2, 1 + max(map(int, lines[0][1::3]))))
    knowledge.play()
    assert knowledge.num_resolves > 0


def test_the_check_finds_a_resolve_that_is_too_early() -> None:
    send, receive = ("send", 1, 0), ("receive", 1, 0)
    early = [[send, send, ("receive", 0, 1), ("resolve", 2, 0)], [receive, ("send", 0, 1), receive]]
    with pytest.raises(AssertionError, match="stage 0 waits for 2, knows of 1"):
        Knowledge(early).play()
