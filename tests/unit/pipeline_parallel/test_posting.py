"""Tests which receives the engine posts ahead: none that could block the process on a GPU.

The first step over NCCL could hang for ever. Every stage posted two activations and two gradients
before its first forward. NCCL's receives occupy the GPU until their messages arrive. The first
launch of a kernel (lazy loading) waits until the GPU is idle. So the first forward waited for a
gradient, which needs this forward.

The tests run the engine of every stage with doubles, and record its calls: this is the program of
the stage's host. The dependences of messages come from the schedule's actions alone
(`schedule.dependencies`), not from the engine's tables.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

from pipeline_parallel.engine import Engine
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.p2p import AHEAD, MessageSpec, StageLink
from pipeline_parallel.schedule.dependencies import Transfer, execution_order, received, sent
from pipeline_parallel.schedule.schedules import SCHEDULES, Action, Kind, Schedule, forward_only
from tests.support.orders import OTHER_ORDERS, schedule_of
from tests.support.pipeline_doubles import IdleStage, NotedCommunicator

SPEC = MessageSpec((1, 2, 3), torch.float32, torch.device("cpu"))


class EarlyLink(StageLink):
    """A link that posts the next receives as early as links did before the rule."""

    def expect(self, *, activations: Sequence[int], gradients: Sequence[int]) -> None:
        super().expect(activations=[0] * len(activations), gradients=[0] * len(gradients))


class Call(NamedTuple):
    """A call of a host: `post`, `receive` (waits), `send`, `resolve` (waits) or `compute`."""

    kind: str
    of: Transfer | Action


class Walk:
    """The calls of every stage in an iteration of a schedule, or in an evaluation."""

    def __init__(
        self,
        schedule: Schedule,
        num_stages: int,
        num_microbatches: int,
        *,
        kind: type[StageLink] = StageLink,
        evaluates: bool = False,
    ) -> None:
        self.num_stages, self.calls = num_stages, list[list[Call]]()
        actions = forward_only if evaluates else schedule
        self.actions = [list(actions(s, num_stages, num_microbatches)) for s in range(num_stages)]
        for stage in range(num_stages):
            communicator = NotedCommunicator(stage, num_stages)
            idle: Any = IdleStage(SPEC.shape, communicator.events)
            link: Any = kind(communicator, SPEC)
            engine = Engine(idle, link, schedule=schedule, num_microbatches=num_microbatches)
            rows = torch.zeros(num_microbatches, 2, dtype=torch.int64)
            labels = rows if stage == num_stages - 1 else None
            batch = PipelineBatch(rows, labels, range(num_microbatches), 1)
            engine.evaluate(batch) if evaluates else engine.train(batch, loss_scale=1.0)
            self.calls.append(list(self._calls_of(stage, communicator.events)))

    def _calls_of(self, stage: int, events: Sequence[str]) -> Iterator[Call]:
        """Yields the calls of a stage; the messages of a direction have the schedule's order."""
        messages = [self._message(s, action) for s, of in enumerate(self.actions) for action in of]
        kinds = {"receive": "post", "wait for receive": "receive", "send": "send"}
        kinds["wait for send"] = "resolve"
        counts: dict[str, int] = {}
        for event in events:
            number = counts.setdefault(event, 0)
            counts[event] += 1
            if event == "compute":
                yield Call(event, self.actions[stage][number])
                continue
            what, _, peer = event.rsplit(" ", 2)
            source, to = (stage, int(peer)) if "send" in what else (int(peer), stage)
            of_link = [t for t in messages if t is not None and t[:2] == (source, to < source)]
            yield Call(kinds[what], of_link[number])

    def _message(self, stage: int, action: Action) -> Transfer | None:
        return sent(stage, action, self.num_stages)

    def too_early(self) -> int:
        """Returns how many receives are posted while their message needs work not yet enqueued."""
        needs = needed_actions(self.actions)
        return sum(
            needs[message][stage] > enqueued
            for stage in range(self.num_stages)
            for message, enqueued in self._posts(stage)
        )

    def _posts(self, stage: int) -> Iterator[tuple[Transfer, int]]:
        """Yields each posted receive with the number of actions that are enqueued before it.

        An action is enqueued when it has computed and its message, if it has one, is sent.
        """
        enqueued = 0
        for kind, of in self.calls[stage]:
            if kind == "post":
                assert isinstance(of, Transfer)
                yield of, enqueued
            is_silent = isinstance(of, Action) and self._message(stage, of) is None
            enqueued += kind == "send" or is_silent

    def count_ahead(self) -> tuple[int, int]:
        """Returns how many receives have a computation between post and use, and their total."""
        ahead = total = 0
        for calls in self.calls:
            for place, call in enumerate(calls):
                if call.kind == "post":
                    until = calls.index(Call("receive", call.of))
                    ahead += any(between.kind == "compute" for between in calls[place:until])
                    total += 1
        return ahead, total

    def most_posted(self) -> int:
        """Returns the most receives of one direction that are posted and not received."""
        most, posted = 0, dict[tuple[int, int, bool], int]()
        for stage, calls in enumerate(self.calls):
            for kind, of in calls:
                if isinstance(of, Transfer) and kind in ("post", "receive"):
                    key = stage, of.source, of.is_gradient
                    posted[key] = posted.get(key, 0) + (1 if kind == "post" else -1)
                    most = max(most, posted[key])
        return most

    def first_of_kinds(self) -> set[tuple[int, Action]]:
        """Returns each stage's first action of each kind, which launches the kind's new kernels."""
        first = {(stage, a.kind): a for stage, of in enumerate(self.actions) for a in reversed(of)}
        return {(stage, action) for (stage, _), action in first.items()}

    def completes(self, draining: Collection[tuple[int, Action]] = (), *, waits: bool) -> bool:
        """Returns whether all stages complete.

        A receive ends when its message is sent, and a send when its receive is posted.

        Args:
            draining: actions (stage, action) in which CUDA waits for all earlier operations of the
                process, as at the first launch of a kernel.
            waits: whether the host waits in `receive` and `resolve`, as on gloo.
        """
        places, started, moved = [0] * self.num_stages, set[Call](), True
        while moved:
            moved = False
            for stage, calls in enumerate(self.calls):
                while places[stage] < len(calls):
                    call = calls[places[stage]]
                    before = [call] if waits and call.kind in ("receive", "resolve") else []
                    if call.kind == "compute" and (stage, call.of) in draining:
                        before = calls[: places[stage]]
                    if not all(_has_ended(operation, started) for operation in before):
                        break
                    started.add(call)
                    places[stage] += 1
                    moved = True
        return places == [len(calls) for calls in self.calls]


def _has_ended(call: Call, started: Collection[Call]) -> bool:
    """Returns whether an operation, or the operation that a call waits for, has ended."""
    if call.kind == "compute":
        return True
    return Call("send" if call.kind in ("post", "receive") else "post", call.of) in started


def needed_actions(actions: Sequence[Sequence[Action]]) -> dict[Transfer, list[int]]:
    """Returns how many actions of each stage must run before a message is sent (vector clocks)."""
    clocks, needs = [[0] * len(actions) for _ in actions], dict[Transfer, list[int]]()
    for stage, action in execution_order(actions):
        needed, message = (of(stage, action, len(actions)) for of in (received, sent))
        if needed is not None:
            clocks[stage] = list(map(max, clocks[stage], needs[needed]))
        clocks[stage][stage] += 1
        if message is not None:
            needs[message] = list(clocks[stage])
    return needs


def check(walk: Walk) -> None:
    assert walk.too_early() == 0
    assert walk.most_posted() <= AHEAD
    assert walk.completes(waits=True)
    assert walk.completes(walk.first_of_kinds(), waits=False)
    for stage, actions in enumerate(walk.actions):
        assert walk.completes({(stage, action) for action in actions}, waits=False), stage


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("mode", SCHEDULES)
def test_no_receive_is_posted_before_the_work_on_which_it_depends(
    mode: str, num_stages: int
) -> None:
    """No stage blocks itself, whether messages arrive at once (gloo) or as late as possible.

    As late as possible: every stage waits for all its operations before the first action of each
    kind, or one stage waits before each of its actions.
    """
    for num_microbatches in (1, 2, 3, 16):
        check(Walk(SCHEDULES[mode], num_stages, num_microbatches))


@pytest.mark.parametrize("num_stages", [2, 4, 8])
@pytest.mark.parametrize(("mode", "late"), [("gpipe", 2), ("1f1b", 1), ("zb-h1", 1)])
def test_nearly_all_receives_are_still_posted_ahead(mode: str, late: int, num_stages: int) -> None:
    """Of 32 receives on a link, one or two have no computation between their post and their use.

    These are the first activation and, in gpipe, the first gradient: its sender receives all
    activations before.
    """
    num_links = num_stages - 1
    ahead, total = Walk(SCHEDULES[mode], num_stages, 16).count_ahead()
    assert (ahead, total) == ((32 - late) * num_links, 32 * num_links)


@pytest.mark.parametrize("num_microbatches", [1, 16])
def test_an_evaluation_posts_all_receives_ahead(num_microbatches: int) -> None:
    walk = Walk(SCHEDULES["1f1b"], 4, num_microbatches, evaluates=True)
    check(walk)
    assert walk.most_posted() == min(AHEAD, num_microbatches)


@pytest.mark.parametrize("lines", OTHER_ORDERS)
def test_the_rule_holds_for_a_schedule_of_another_order(lines: list[str]) -> None:
    check(Walk(schedule_of(lines), 2, 1 + max(map(int, lines[0][1::3]))))


@pytest.mark.parametrize(("num_stages", "early"), [(2, 30), (4, 84), (8, 168)])
@pytest.mark.parametrize("mode", ["1f1b", "zb-h1"])
def test_the_walk_finds_receives_that_are_posted_too_early(
    mode: str, num_stages: int, early: int
) -> None:
    """Without the rule, most receives are too early: gloo completes, but lazy loading hangs."""
    walk = Walk(SCHEDULES[mode], num_stages, 16, kind=EarlyLink)
    assert walk.too_early() == early
    assert walk.completes(waits=True)
    assert not walk.completes(walk.first_of_kinds(), waits=False)


def test_two_stages_that_wait_at_the_same_time_can_still_block_each_other() -> None:
    """So the rule is not enough, and a warm-up loads the kernels before the first receive.

    Stage 0 waits before F1 for gradient 0, and stage 1 waits before F0 for activation 1.
    """
    walk = Walk(SCHEDULES["1f1b"], 2, 2)
    waiting = {(0, Action(Kind.FORWARD, 1)), (1, Action(Kind.FORWARD, 0))}
    assert not walk.completes(waiting, waits=False)
