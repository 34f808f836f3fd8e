"""Schedules: the order in which a stage runs microbatches.

The code of a schedule uses no tensors, no communication and no I/O.
A schedule yields the actions of one stage in order. The engine receives a message before an action
and sends a message after the action, so a schedule does not contain messages. In every schedule,
all stages run the backward passes of the microbatches in the same order. So the sums of the
gradients are the same for any number of stages, equal to the last bit.

A new schedule is one generator function and one line in `SCHEDULES`. The module `validate` checks a
schedule before it runs, the module `simulator` computes the time of a schedule, and the command

    python -m pipeline_parallel.schedule --pp-mode zb-h1 --stages 4 --microbatches 8

prints the timetable of a schedule.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """The kinds of actions; a backward pass is B, or it is split into I and a later W."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


class Action(NamedTuple):
    """An action: forward, backward or a part of backward of one microbatch on a stage."""

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"


# A schedule: a function of (stage, num_stages, num_microbatches) that yields the stage's actions.
Schedule = Callable[[int, int, int], Iterator[Action]]


# Timetables: time runs to the right in slots; F, I and W take one slot each, B two ("B0 ==").


# GPipe (Huang et al., arXiv 1811.06965), 3 stages, 3 microbatches:
#
#   stage 0   F0 F1 F2 .  .  .  .  .  .  B0 == B1 == B2 ==
#   stage 1   .  F0 F1 F2 .  .  .  B0 == B1 == B2 == .  .
#   stage 2   .  .  F0 F1 F2 B0 == B1 == B2 == .  .  .  .
def gpipe(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Yields all forwards, then all backwards; all microbatches are in flight at the same time."""
    yield from forward_only(stage, num_stages, num_microbatches)
    for microbatch in range(num_microbatches):
        yield Action(Kind.BACKWARD, microbatch)


# One forward, one backward (Narayanan et al., arXiv 2104.04473), 3 stages, 4 microbatches:
#
#   stage 0   F0 F1 F2 .  .  .  .  B0 == F3 B1 == .  B2 == .  B3 ==
#   stage 1   .  F0 F1 .  .  B0 == F2 B1 == F3 B2 == .  B3 == .  .
#   stage 2   .  .  F0 B0 == F1 B1 == F2 B2 == F3 B3 == .  .  .  .
def one_forward_one_backward(
    stage: int, num_stages: int, num_microbatches: int
) -> Iterator[Action]:
    """Yields each backward as early as possible.

    At most num_stages - stage microbatches are in flight.
    """
    ahead = min(num_stages - stage - 1, num_microbatches)
    for microbatch in range(ahead):
        yield Action(Kind.FORWARD, microbatch)
    for microbatch in range(num_microbatches):
        if microbatch + ahead < num_microbatches:
            yield Action(Kind.FORWARD, microbatch + ahead)
        yield Action(Kind.BACKWARD, microbatch)


# ZB-H1 (Qi et al., arXiv 2401.10241), 3 stages, 4 microbatches; backward is split:
#
#   stage 0   F0 F1 F2 .  .  B0 == F3 B1 == B2 == B3 ==
#   stage 1   .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
#   stage 2   .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
def zero_bubble_h1(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Yields 1f1b with B split into I and W; W runs later, when the stage would otherwise wait.

    Stage i delays each weight gradient by i microbatches. No other stage waits for a gradient from
    the first stage, so the first stage does not split backward.

    At most num_stages microbatches are in flight (from F to the end of W). If each action
    takes the same time on all stages and num_microbatches >= num_stages, each stage is idle for
    (num_stages - 1) * (F + I - min(F, I, W)) seconds; here F, I and W are the seconds of these
    actions. The paper assumes that W is the shortest action, so the second factor is F + I - W
    there. For 1f1b the second factor is F + I + W.
    """
    for action in one_forward_one_backward(stage, num_stages, num_microbatches):
        kind, microbatch = action
        if stage == 0 or kind is Kind.FORWARD:
            yield action
            continue
        yield Action(Kind.INPUT_GRADIENT, microbatch)
        if microbatch >= stage:
            yield Action(Kind.WEIGHT_GRADIENT, microbatch - stage)
    for microbatch in range(max(0, num_microbatches - stage), num_microbatches):
        yield Action(Kind.WEIGHT_GRADIENT, microbatch)


def forward_only(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """Yields only forwards, for an evaluation."""
    for microbatch in range(num_microbatches):
        yield Action(Kind.FORWARD, microbatch)


def splits_backward(schedule: Schedule, stage: int, num_stages: int) -> bool:
    """Returns whether the schedule splits backward into I and W on this stage."""
    return any(action.kind is Kind.WEIGHT_GRADIENT for action in schedule(stage, num_stages, 1))


SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "zb-h1": zero_bubble_h1,
}
