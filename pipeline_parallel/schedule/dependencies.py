"""An execution order of the actions of all stages, or the deadlock that prevents it.

The validator checks only that an execution order exists. The simulator computes times for the
actions in this order. Sends do not wait, and receives are posted early, in the order of the stage's
actions. So the next action of a stage can start when the message that it needs has been sent. The
number of receives that are posted early makes no difference.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pipeline_parallel.schedule.schedules import Action, Kind


class Transfer(NamedTuple):
    """A message of a microbatch from stage `source`.

    It is an activation for the next stage, or a gradient for the previous stage.
    """

    source: int
    is_gradient: bool
    microbatch: int

    def __str__(self) -> str:
        what = "gradient" if self.is_gradient else "activation"
        return f"the {what} of microbatch {self.microbatch} from stage {self.source}"


def received(stage: int, action: Action, num_stages: int) -> Transfer | None:
    """Returns the message that `action` of `stage` needs before it starts.

    Returns None if no message is needed: for W, for F on the first stage, and for B and I on the
    last stage. These letters are the values of `Kind`.
    """
    if action.kind is Kind.FORWARD:
        return Transfer(stage - 1, False, action.microbatch) if stage > 0 else None
    if action.kind is Kind.WEIGHT_GRADIENT or stage == num_stages - 1:
        return None
    return Transfer(stage + 1, True, action.microbatch)


def sent(stage: int, action: Action, num_stages: int) -> Transfer | None:
    """Returns the message that `action` of `stage` sends at its end.

    Returns None if no message is sent: for W, for F on the last stage, and for B and I on the first
    stage. These letters are the values of `Kind`.
    """
    if action.kind is Kind.FORWARD:
        return Transfer(stage, False, action.microbatch) if stage < num_stages - 1 else None
    if action.kind is Kind.WEIGHT_GRADIENT or stage == 0:
        return None
    return Transfer(stage, True, action.microbatch)


def execution_order(actions: Sequence[Sequence[Action]]) -> Iterator[tuple[int, Action]]:
    """Yields (stage, action) for all actions; each action follows the one whose message it needs.

    Args:
        actions: the actions of each stage, in the order of the schedule.

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
    """Returns the error text for a deadlock.

    `waiting` has, for each stage that waits for a message, the action that needs this message. The
    function goes from a waiting stage to the stage that should send the message, and so on, until
    it comes to a stage that has ended, or to a stage for the second time.
    """
    path = [min(waiting)]
    while True:
        message = received(path[-1], waiting[path[-1]], num_stages)
        assert message is not None, "an action waits only for a message"
        if message.source not in waiting:
            return f"stage {path[-1]}, {waiting[path[-1]]}: waits for {message}, but none is sent"
        if message.source in path:
            return "deadlock: " + ", while ".join(
                f"stage {stage} waits before {waiting[stage]} for "
                f"{received(stage, waiting[stage], num_stages)}"
                for stage in path[path.index(message.source) :]
            )
        path.append(message.source)
