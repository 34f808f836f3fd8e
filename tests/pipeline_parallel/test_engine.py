"""The engine on doubles: what it may let go of when, what it holds, and how it fails."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from comm.communicator import PeerLostError
from pipeline_parallel.engine import Engine, PipelineBatch, StageError
from pipeline_parallel.schedule import SCHEDULES, Schedule, gpipe, zero_bubble_h1
from pipeline_parallel.validate import peak_live
from tests.memory import peak_bytes
from tests.pipeline_parallel.doubles import NotedCommunicator
from tests.pipeline_parallel.orders import schedule_of
from tests.pipeline_parallel.stages import (
    HIDDEN,
    ROWS,
    TOKENS,
    VOCABULARY,
    make_engine,
    make_model,
    make_stage,
)

# ---- what is let go of has arrived ----


class NotedChannel:
    """A channel that notes what the engine asks of it."""

    def __init__(self, stage: int, num_stages: int) -> None:
        self._is_first, self._is_last = stage == 0, stage == num_stages - 1
        self.calls: list[tuple[str, int, int]] = []  # what, and how many of each kind

    def expect(self, *, activations: int, gradients: int) -> None:
        """All come."""

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

    def settle(self, *, activations: int = 0, gradients: int = 0) -> None:
        self.calls.append(("settle", activations, gradients))

    def flush(self) -> None:
        """All left."""


class IdleStage:
    """Computes nothing."""

    def forward(self, microbatch: int, x: Tensor, *args: object, **options: object) -> Tensor:
        return torch.zeros(())

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor:
        return torch.zeros(())

    def weight_gradient(self, microbatch: int) -> None:
        """Nothing to add."""


def calls_of(schedule: Schedule, num_stages: int, num_microbatches: int) -> list[list[Any]]:
    """What the engine of each stage asks of its channel, in order."""
    found = []
    for stage in range(num_stages):
        channel: Any = NotedChannel(stage, num_stages)
        idle: Any = IdleStage()
        engine = Engine(
            idle, channel, schedule=schedule, stage_index=stage, num_stages=num_stages,
            num_microbatches=num_microbatches,
        )  # fmt: skip
        rows = torch.zeros(num_microbatches, 2, dtype=torch.int64)
        labels = rows if stage == num_stages - 1 else None
        engine.train(PipelineBatch(rows, labels, range(num_microbatches), 1), loss_scale=1.0)
        found.append(channel.calls)
    return found


class Knowledge:
    """What each stage can know of the others: how many of their calls are over.

    Vector clocks (Lamport's happened-before): a message brings what its sender knew.
    """

    def __init__(self, calls: Sequence[Sequence[tuple[str, int, int]]]) -> None:
        self._calls = calls
        self._known = [[0] * len(calls) for _ in calls]
        self._sent: list[dict[str, list[list[int]]]] = [{"a": [], "g": []} for _ in calls]
        self._received: list[dict[str, int]] = [{"a": 0, "g": 0} for _ in calls]
        self.num_settles = 0

    def play(self) -> None:
        """Runs all calls, each as early as it can; a settle must know what it lets go of."""
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
        elif what == "settle":
            self._check_arrived(stage, stage + 1, "a", activations)
            self._check_arrived(stage, stage - 1, "g", gradients)
        self._known[stage][stage] += 1
        if what == "send":
            self._sent[stage][kind].append(list(self._known[stage]))
        return True

    def _check_arrived(self, stage: int, neighbour: int, kind: str, count: int) -> None:
        count = min(count, len(self._sent[stage][kind]))  # no more than were sent can be let go of
        if not 0 <= neighbour < len(self._calls) or count == 0:
            return
        self.num_settles += 1
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
    assert (knowledge.num_settles > 0) == (num_stages > 1)


@pytest.mark.parametrize(
    "lines",
    [
        ["F2 F1 F0 B2 B1 B0", "F2 F1 F0 B2 B1 B0"],
        ["F0 F1 F2 B2 B1 B0", "F0 F1 F2 B2 B1 B0"],
        ["F2 F0 F1 B0 B2 B1", "F2 F0 B0 F1 B2 B1"],
        ["F1 F0 I1 W1 I0 W0", "F1 I1 F0 W1 I0 W0"],
    ],
)
def test_nor_in_a_schedule_of_another_order(lines: list[str]) -> None:
    """The validator lets through any order that both neighbours have."""
    knowledge = Knowledge(calls_of(schedule_of(lines), 2, 1 + max(map(int, lines[0][1::3]))))
    knowledge.play()
    assert knowledge.num_settles > 0


def test_the_check_finds_a_settle_that_is_too_early() -> None:
    send, receive = ("send", 1, 0), ("receive", 1, 0)
    early = [[send, send, ("receive", 0, 1), ("settle", 2, 0)],
             [receive, ("send", 0, 1), receive]]  # fmt: skip
    with pytest.raises(AssertionError, match="stage 0 waits for 2, knows of 1"):
        Knowledge(early).play()


# ---- messages ----


def test_gpipes_first_stage_runs_all_forwards_before_the_second_begins() -> None:
    """No send is waited for, and nobody is there to receive."""
    communicator = NotedCommunicator(0, 2)
    communicator.at_receive = nobody_there
    engine = make_engine(gpipe, communicator, num_microbatches=8)
    with pytest.raises(PeerLostError):
        engine.train(batch(8, first=True, last=False), loss_scale=1.0)
    before = communicator.events[: communicator.events.index("wait for receive from 1")]
    assert before == ["receive from 1"] * 2 + ["send to 1"] * 8


def nobody_there() -> None:
    raise PeerLostError("nobody there")


def batch(count: int, *, first: bool, last: bool) -> PipelineBatch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (count * ROWS, TOKENS), generator=generator)
    keys = range(count * ROWS)
    return PipelineBatch(tokens if first else None, tokens if last else None, keys, ROWS)


# ---- what is held ----

P, M = 4, 32


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("stage_index", range(P))
@pytest.mark.parametrize("mode", SCHEDULES)
def test_microbatches_held_are_those_of_the_schedule(
    mode: str, stage_index: int, recompute: bool
) -> None:
    communicator = NotedCommunicator(stage_index, P)
    stage = make_stage(communicator, schedule=SCHEDULES[mode], recompute=recompute)
    held: list[int] = []
    noted: Any = NotedStage(stage, held)
    engine = make_engine(SCHEDULES[mode], communicator, num_microbatches=M, stage=noted)
    ends = {"first": stage_index == 0, "last": stage_index == P - 1}
    engine.train(batch(M, **ends), loss_scale=1.0)
    expected = {"gpipe": M, "1f1b": P - stage_index, "zb-h1": min(P, M)}[mode]
    assert max(held) == peak_live(SCHEDULES[mode], stage_index, P, M) == expected
    assert held[-1] == 0


class NotedStage:
    """A stage that notes after each call how many microbatches it holds something of."""

    def __init__(self, stage: Any, held: list[int]) -> None:
        self._stage, self._held = stage, held

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._stage, name)

        def noted(*args: Any, **options: Any) -> Any:
            out = call(*args, **options)
            self._held.append(len(self._stage._live.keys() | self._stage._deferred.keys()))
            return out

        return noted


@cache
def peak_of(mode: str, stage_index: int, num_microbatches: int, *, recompute: bool) -> int:
    communicator = NotedCommunicator(stage_index, P)
    engine = make_engine(
        SCHEDULES[mode], communicator, num_microbatches=num_microbatches, recompute=recompute
    )
    ends = {"first": stage_index == 0, "last": stage_index == P - 1}
    rows = batch(num_microbatches, **ends)
    engine.train(rows, loss_scale=1.0)  # what is made once is there
    return peak_bytes(lambda: engine.train(rows, loss_scale=1.0))[1]


ACTIVATION = 4 * ROWS * TOKENS * HIDDEN  # bytes


@pytest.mark.parametrize(("stage_index", "recompute"), [(0, False), (P - 1, False), (1, True)])
def test_memory_falls_with_the_microbatches_held(stage_index: int, recompute: bool) -> None:
    """1f1b takes for 32 microbatches what gpipe takes for the few that it holds at once.

    On top of that are what travels: two that are received ahead each way.
    """
    gpipe_of = partial(peak_of, "gpipe", stage_index, recompute=recompute)
    held = P - stage_index
    of_one = gpipe_of(num_microbatches=5) - gpipe_of(num_microbatches=4)
    assert gpipe_of(num_microbatches=M) >= M * of_one > 0
    found = peak_of("1f1b", stage_index, M, recompute=recompute)
    assert held * of_one < found <= gpipe_of(num_microbatches=held) + 4 * ACTIVATION


@pytest.mark.parametrize("stage_index", [0, P - 1])
def test_weight_gradients_that_wait_cost_little_memory(stage_index: int) -> None:
    """zb-h1 takes for 32 microbatches what gpipe takes for P, and a little more.

    Between I and W a microbatch of a layer holds inputs and gradients of its four products, 16
    activations in all, where it held 12.5 before: 7 more for two layers, of `stage_index` of them
    and of the one that has its I. The last stage has the gradients of its logits besides.
    """
    found = peak_of("zb-h1", stage_index, M, recompute=False)
    as_many = peak_of("gpipe", stage_index, P, recompute=False)
    waiting = 7 * (stage_index + 1) * ACTIVATION
    logits = 4 * ROWS * (TOKENS - 1) * VOCABULARY * P if stage_index == P - 1 else 0
    assert found <= as_many + waiting + logits + 4 * ACTIVATION
    assert found < peak_of("gpipe", stage_index, M, recompute=False) / 4


# ---- failures ----


BACKWARDS = {"gpipe": "backward", "1f1b": "backward", "zb-h1": "input gradient"}


@pytest.mark.parametrize("mode", SCHEDULES)
def test_a_failure_in_backward_names_stage_microbatch_action_and_shape(mode: str) -> None:
    """On a middle stage, in the fourth microbatch; the cause is chained."""
    communicator = NotedCommunicator(1, 3)
    model = make_model(1, 3)
    cause, seen = ValueError("no such thing"), list[Tensor]()

    def fail(gradient: Tensor) -> None:
        raise cause

    def note(module: nn.Module, args: object, out: Tensor) -> None:
        seen.append(out)
        if len(seen) == 4:
            out.register_hook(fail)

    model[0].register_forward_hook(note)
    stage = make_stage(communicator, schedule=SCHEDULES[mode], recompute=False, model=model)
    engine = make_engine(SCHEDULES[mode], communicator, num_microbatches=6, stage=stage)
    with pytest.raises(StageError) as caught:
        engine.train(batch(6, first=False, last=False), loss_scale=1.0)
    assert caught.value.__cause__ is cause
    assert str(caught.value) == (
        f"stage 1, {BACKWARDS[mode]} of microbatch 3; what came in last: "
        f"({ROWS}, {TOKENS}, {HIDDEN}) torch.float32"
    )


def test_a_failure_of_a_weight_gradient_is_named() -> None:
    communicator = NotedCommunicator(0, 2)
    stage = make_stage(communicator, schedule=zero_bubble_h1, recompute=False)
    engine = make_engine(zero_bubble_h1, communicator, num_microbatches=3, stage=stage)
    with (
        patch.object(stage, "weight_gradient", side_effect=MemoryError),
        pytest.raises(StageError, match="stage 0, weight gradient of microbatch 0") as caught,
    ):
        engine.train(batch(3, first=True, last=False), loss_scale=1.0)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_failure_on_token_ids_has_their_shape() -> None:
    engine = make_engine(gpipe, NotedCommunicator(0, 2), num_microbatches=1)
    tokens = torch.full((ROWS, TOKENS), 10**6)
    with pytest.raises(StageError) as caught:
        engine.train(PipelineBatch(tokens, None, range(ROWS), ROWS), loss_scale=1.0)
    assert str(caught.value).endswith(f"last: ({ROWS}, {TOKENS}) torch.int64")
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_lost_peer_is_not_the_stages_failure() -> None:
    communicator = NotedCommunicator(0, 2)
    lost = PeerLostError("pipeline receive from rank 1: gone")

    def lose() -> None:
        raise lost

    communicator.at_receive = lose
    engine = make_engine(gpipe, communicator, num_microbatches=2)
    with pytest.raises(PeerLostError) as caught:
        engine.train(batch(2, first=True, last=False), loss_scale=1.0)
    assert caught.value is lost
    assert caught.value.__cause__ is None
    assert not isinstance(caught.value, StageError)
