"""The order in which a stage runs microbatches, as pure data: no tensor, no rank, no I/O.

A schedule yields one stage's actions in order. The engine receives before an action and sends
after it, so a schedule names no messages. Backward visits the microbatches in one order on every
stage, for any number of stages: gradients then add up to the same bits.

Adding a schedule is one generator and one line in `SCHEDULES`. The package's `validate` checks any
schedule before it runs, its `simulator` computes how long it takes, and

    python -m pipeline_parallel.schedule --pp-mode zb-h1 --stages 4 --microbatches 8

prints its timetable.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    """The kinds of actions; a backward pass is B, or in its two parts first I and later W."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


class Action(NamedTuple):
    """One pass of a microbatch through a stage in one direction."""

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"


# A schedule: (stage, num_stages, num_microbatches) to the actions of that stage.
Schedule = Callable[[int, int, int], Iterator[Action]]


# Timetables: time runs to the right in slots; F, I and W take one slot each, B two ("B0 ==").


# GPipe (Huang et al., arXiv 1811.06965), 3 stages, 3 microbatches:
#
#   stage 0   F0 F1 F2 .  .  .  .  .  .  B0 == B1 == B2 ==
#   stage 1   .  F0 F1 F2 .  .  .  B0 == B1 == B2 == .  .
#   stage 2   .  .  F0 F1 F2 B0 == B1 == B2 == .  .  .  .
def gpipe(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """All forwards, then all backwards: all microbatches are in flight at once."""
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
    """Backward as early as possible: at most num_stages - stage microbatches are in flight."""
    ahead = min(num_stages - stage - 1, num_microbatches)
    for microbatch in range(ahead):
        yield Action(Kind.FORWARD, microbatch)
    for microbatch in range(num_microbatches):
        if microbatch + ahead < num_microbatches:
            yield Action(Kind.FORWARD, microbatch + ahead)
        yield Action(Kind.BACKWARD, microbatch)


# ZB-H1 (Qi et al., arXiv 2401.10241), 3 stages, 4 microbatches; backward in its two parts:
#
#   stage 0   F0 F1 F2 .  .  B0 == F3 B1 == B2 == B3 ==
#   stage 1   .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 I3 W2 W3
#   stage 2   .  .  F0 I0 F1 I1 F2 I2 W0 F3 I3 W1 W2 W3
def zero_bubble_h1(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """1f1b with `stage` weight gradients deferred to where the stage would otherwise wait.

    No stage waits for a gradient of the first stage, so its backward is not split.

    From forward to weight gradient at most num_stages microbatches are in flight. Where all stages
    cost the same and num_microbatches is at least num_stages, each stage idles (num_stages - 1)
    times F + I - min(F, I, W): the paper's F + I - W, which takes W for the shortest (1f1b:
    F + I + W).
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
    """The order of an evaluation."""
    for microbatch in range(num_microbatches):
        yield Action(Kind.FORWARD, microbatch)


def splits_backward(schedule: Schedule, stage: int, num_stages: int) -> bool:
    """Returns whether backward comes in two parts on this stage."""
    return any(action.kind is Kind.WEIGHT_GRADIENT for action in schedule(stage, num_stages, 1))


SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "zb-h1": zero_bubble_h1,
}
