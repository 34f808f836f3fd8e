"""When a stage runs which microbatch, as pure data: no tensor, no rank, no input or output.

A schedule yields one stage's actions in order. The engine receives what an action needs before it
and sends what it made after it, so a schedule names neither. Backward visits the microbatches in
one order on every stage, whatever their number: gradients then add up to the same bits.

Adding a schedule is one generator and one line in `SCHEDULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple


class Kind(Enum):
    FORWARD = "F"
    BACKWARD = "B"


class Action(NamedTuple):
    """One microbatch, once through a stage in one direction."""

    kind: Kind
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind.value}{self.microbatch}"


# A schedule: (stage, num_stages, num_microbatches) to the actions of that stage.
Schedule = Callable[[int, int, int], Iterator[Action]]


# GPipe (Huang et al., arXiv 1811.06965), 3 stages, 3 microbatches; time runs to the right:
#
#   stage 0   F0 F1 F2 .  .  .  .  B0 B1 B2
#   stage 1   .  F0 F1 F2 .  .  B0 B1 B2 .
#   stage 2   .  .  F0 F1 F2 B0 B1 B2 .  .
def gpipe(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """All forwards, then all backwards; every microbatch's activations live at once."""
    for microbatch in range(num_microbatches):
        yield Action(Kind.FORWARD, microbatch)
    for microbatch in range(num_microbatches):
        yield Action(Kind.BACKWARD, microbatch)


def forward_only(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
    """What evaluation runs."""
    for microbatch in range(num_microbatches):
        yield Action(Kind.FORWARD, microbatch)


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe}
