"""All stages of a schedule played in an order in which they can run, or the deadlock they end in.

The validator asks only whether that order exists, the simulator puts times to it. Sends wait for
nobody, and a stage may post its receives as far ahead as it likes, in the order of its own actions:
either way an action can start exactly when the action that makes its message has run, so one replay
stands for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline_parallel.schedule.schedules import Action, Kind


class Transfer(NamedTuple):
    """What stage `source` sends of a microbatch: its activation onwards or a gradient back."""

    source: int
    is_gradient: bool
    microbatch: int

    def __str__(self) -> str:
        what = "gradient" if self.is_gradient else "activation"
        return f"the {what} of microbatch {self.microbatch} from stage {self.source}"


def needs(stage: int, action: Action, num_stages: int) -> Transfer | None:
    """The message that `action` of `stage` starts with; None at the ends, and for W."""
    if action.kind is Kind.FORWARD:
        return Transfer(stage - 1, False, action.microbatch) if stage > 0 else None
    if action.kind is Kind.WEIGHT_GRADIENT or stage == num_stages - 1:
        return None
    return Transfer(stage + 1, True, action.microbatch)


def makes(stage: int, action: Action, num_stages: int) -> Transfer | None:
    """The message that `action` of `stage` ends with; None at the ends, and for W."""
    if action.kind is Kind.FORWARD:
        return Transfer(stage, False, action.microbatch) if stage < num_stages - 1 else None
    if action.kind is Kind.WEIGHT_GRADIENT or stage == 0:
        return None
    return Transfer(stage, True, action.microbatch)


def replay(orders: Sequence[Sequence[Action]]) -> Iterator[tuple[int, Action]]:
    """Every action of every stage, each after the one that makes its message.

    `orders` has the actions of each stage. Raises ValueError where no stage can go on: it names the
    stages that wait for each other, or the one that waits for what is never sent.
    """
    num_stages = len(orders)
    position = [0] * num_stages
    sent: set[Transfer | None] = {None}
    moved = True
    while moved:
        moved = False
        for stage, actions in enumerate(orders):
            while position[stage] < len(actions):
                action = actions[position[stage]]
                if needs(stage, action, num_stages) not in sent:
                    break
                yield stage, action
                sent.add(makes(stage, action, num_stages))
                position[stage] += 1
                moved = True
    waiting = {s: orders[s][position[s]] for s in range(num_stages) if position[s] < len(orders[s])}
    if waiting:
        raise ValueError(_deadlock(waiting, num_stages))


def _deadlock(waiting: dict[int, Action], num_stages: int) -> str:
    """From any stage that waits, on to the one it waits for, until a stage comes up again."""
    path = [min(waiting)]
    while True:
        message = needs(path[-1], waiting[path[-1]], num_stages)
        assert message is not None, "only a message is waited for"
        if message.source not in waiting:
            return f"stage {path[-1]}, {waiting[path[-1]]}: waits for {message}, which never comes"
        if message.source in path:
            return "deadlock: " + ", while ".join(
                f"stage {stage} waits before {waiting[stage]} for "
                f"{needs(stage, waiting[stage], num_stages)}"
                for stage in path[path.index(message.source) :]
            )
        path.append(message.source)
