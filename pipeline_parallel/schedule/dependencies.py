"""All stages of a schedule in an order in which they can run, or the deadlock they end in.

The validator asks only whether that order exists; the simulator puts times to it. Sends do not
wait, and a stage may post its receives as far ahead as it likes, in the order of its own actions.
Either way an action can start exactly when the action that sends its message has run, so one order
stands for both.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline_parallel.schedule.schedules import Action, Kind


class Transfer(NamedTuple):
    """A message of a microbatch from stage `source`: its activation onwards or a gradient back."""

    source: int
    is_gradient: bool
    microbatch: int

    def __str__(self) -> str:
        what = "gradient" if self.is_gradient else "activation"
        return f"the {what} of microbatch {self.microbatch} from stage {self.source}"


def received(stage: int, action: Action, num_stages: int) -> Transfer | None:
    """Returns the message that `action` of `stage` starts with; None at the ends, and for W."""
    if action.kind is Kind.FORWARD:
        return Transfer(stage - 1, False, action.microbatch) if stage > 0 else None
    if action.kind is Kind.WEIGHT_GRADIENT or stage == num_stages - 1:
        return None
    return Transfer(stage + 1, True, action.microbatch)


def sent(stage: int, action: Action, num_stages: int) -> Transfer | None:
    """Returns the message that `action` of `stage` ends with; None at the ends, and for W."""
    if action.kind is Kind.FORWARD:
        return Transfer(stage, False, action.microbatch) if stage < num_stages - 1 else None
    if action.kind is Kind.WEIGHT_GRADIENT or stage == 0:
        return None
    return Transfer(stage, True, action.microbatch)


def execution_order(actions: Sequence[Sequence[Action]]) -> Iterator[tuple[int, Action]]:
    """Yields every action of every stage, each after the one that sends its message.

    Args:
        actions: those of each stage, in its order.

    Raises:
        ValueError: no stage can continue. The text names the stages that wait for each other, or
            the stage that waits for a message that is never sent.
    """
    num_stages = len(actions)
    position = [0] * num_stages
    messages: set[Transfer | None] = {None}
    moved = True
    while moved:
        moved = False
        for stage, of_stage in enumerate(actions):
            while position[stage] < len(of_stage):
                action = of_stage[position[stage]]
                if received(stage, action, num_stages) not in messages:
                    break
                yield stage, action
                messages.add(sent(stage, action, num_stages))
                position[stage] += 1
                moved = True
    waiting = {
        stage: of_stage[position[stage]]
        for stage, of_stage in enumerate(actions)
        if position[stage] < len(of_stage)
    }
    if waiting:
        raise ValueError(_deadlock(waiting, num_stages))


def _deadlock(waiting: dict[int, Action], num_stages: int) -> str:
    """Follows each stage that waits to the one it waits for, until a stage comes up again."""
    path = [min(waiting)]
    while True:
        message = received(path[-1], waiting[path[-1]], num_stages)
        assert message is not None, "only a message is waited for"
        if message.source not in waiting:
            return f"stage {path[-1]}, {waiting[path[-1]]}: waits for {message}, which never comes"
        if message.source in path:
            return "deadlock: " + ", while ".join(
                f"stage {stage} waits before {waiting[stage]} for "
                f"{received(stage, waiting[stage], num_stages)}"
                for stage in path[path.index(message.source) :]
            )
        path.append(message.source)
