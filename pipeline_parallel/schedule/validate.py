"""Whether a schedule can run and trains what it should: asked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from pipeline_parallel.schedule.dependencies import replay
from pipeline_parallel.schedule.schedules import Action, Kind, Schedule

BACKWARD_BEGINS = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
BACKWARD_ENDS = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)

GIVEN = "would be given the message of {theirs} of stage {first}, which is sent earlier"
SUMS = "stage {first} has {theirs} in its place: gradients would add up in another order"


def check_schedule(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    """Raises ValueError, naming stage, action and fault, unless on `num_stages` stages

    - each stage runs each microbatch forward once and then backward once: B, or I and later W;
    - each stage receives activations and gradients in the order in which its neighbour sends them,
      for messages between two stages do not overtake each other;
    - gradients are added to the weights in one order on all stages;
    - no stage waits for a message that is never sent, nor two for each other.
    """
    if num_stages < 1 or num_microbatches < 1:
        raise ValueError(
            "expected at least 1 stage and 1 microbatch, "
            f"got {num_stages} stages and {num_microbatches} microbatches"
        )
    orders = [list(schedule(stage, num_stages, num_microbatches)) for stage in range(num_stages)]
    for stage, actions in enumerate(orders):
        _check_actions(stage, actions, num_microbatches)
    for stage in range(1, num_stages):
        _check_order((Kind.FORWARD,), GIVEN, stage - 1, stage, orders)
        _check_order(BACKWARD_BEGINS, GIVEN, stage, stage - 1, orders)
        _check_order(BACKWARD_ENDS, SUMS, 0, stage, orders)
    for _ in replay(orders):
        pass


def peak_live(schedule: Schedule, stage: int, num_stages: int, num_microbatches: int) -> int:
    """The most microbatches that `stage` holds at once, each from F until B or W has run.

    Without recompute that is how many microbatches' activations are in memory.
    """
    return _peak(schedule(stage, num_stages, num_microbatches), (Kind.FORWARD,))


def peak_recomputed(schedule: Schedule, stage: int, num_stages: int, num_microbatches: int) -> int:
    """The most microbatches whose recomputed activations `stage` holds at once.

    With recompute a backward pass makes them anew. B drops each block's at once; I makes those of
    all the stage's blocks, and they stay until W has run.
    """
    return _peak(schedule(stage, num_stages, num_microbatches), BACKWARD_BEGINS)


def _peak(actions: Iterable[Action], begins: Sequence[Kind]) -> int:
    live = peak = 0
    for action in actions:
        live += action.kind in begins
        peak = max(peak, live)
        live -= action.kind in BACKWARD_ENDS
    return peak


def _check_actions(stage: int, actions: Sequence[Action], num_microbatches: int) -> None:
    """What can be told from one stage alone."""
    when: dict[Action, int] = {}
    for position, action in enumerate(actions):
        if not 0 <= action.microbatch < num_microbatches:
            last = num_microbatches - 1
            raise ValueError(f"stage {stage}, {action}: the microbatches are 0 to {last}")
        if action in when:
            raise ValueError(f"stage {stage}, {action}: runs twice")
        when[action] = position
    for microbatch in range(num_microbatches):
        path = _path(stage, when, microbatch)
        for before, after in pairwise(path):
            if when[after] < when[before]:
                raise ValueError(f"stage {stage}, {after}: runs before {before}")


def _path(stage: int, when: dict[Action, int], microbatch: int) -> list[Action]:
    """The actions of a microbatch as they must follow each other; all are there, and no other."""
    f, b, i, w = (Action(kind, microbatch) for kind in Kind)
    path = [f, b] if b in when else [f, i, w]
    if b not in when and i not in when and w not in when:
        raise ValueError(f"stage {stage}, {b}: never runs, nor do {i} and {w}")
    for action in path:
        if action not in when:
            raise ValueError(f"stage {stage}, {action}: never runs")
    for action in (i, w):
        if b in when and action in when:
            raise ValueError(f"stage {stage}, {action}: runs although {b} does all of backward")
    return path


def _check_order(
    kinds: Sequence[Kind], fault: str, first: int, then: int, orders: Sequence[Sequence[Action]]
) -> None:
    """Stage `then` must visit the microbatches as `first` does in its actions of these kinds."""
    pairs = ([a for a in orders[stage] if a.kind in kinds] for stage in (first, then))
    for theirs, ours in zip(*pairs, strict=True):
        if theirs.microbatch != ours.microbatch:
            raise ValueError(f"stage {then}, {ours}: " + fault.format(theirs=theirs, first=first))
