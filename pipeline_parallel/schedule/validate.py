"""Checks of a schedule before it runs, and the number of its microbatches in flight."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from pipeline_parallel.schedule.dependencies import execution_order
from pipeline_parallel.schedule.schedules import Action, Kind, Schedule

BACKWARD_BEGINS = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
BACKWARD_ENDS = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)

OUT_OF_TURN = "would be given the message of {theirs} of stage {first}, which is sent earlier"
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
        _check_order((Kind.FORWARD,), OUT_OF_TURN, stage - 1, stage, orders)
        _check_order(BACKWARD_BEGINS, OUT_OF_TURN, stage, stage - 1, orders)
        _check_order(BACKWARD_ENDS, SUMS, 0, stage, orders)
    for _ in execution_order(orders):
        pass


def peak_in_flight(schedule: Schedule, stage: int, num_stages: int, num_microbatches: int) -> int:
    """Returns the most microbatches in flight at once on `stage`, each from F until B or W ends.

    Without recompute, the activations of so many microbatches are in memory.
    """
    return _peak(schedule(stage, num_stages, num_microbatches), (Kind.FORWARD,))


def peak_recomputed(schedule: Schedule, stage: int, num_stages: int, num_microbatches: int) -> int:
    """Returns the most microbatches whose recomputed activations are in memory at once on `stage`.

    B recomputes and drops them block by block; I recomputes those of all blocks of the stage, which
    stay until W ends.
    """
    return _peak(schedule(stage, num_stages, num_microbatches), BACKWARD_BEGINS)


def _peak(actions: Iterable[Action], begins: Sequence[Kind]) -> int:
    in_flight = peak = 0
    for action in actions:
        in_flight += action.kind in begins
        peak = max(peak, in_flight)
        in_flight -= action.kind in BACKWARD_ENDS
    return peak


def _check_actions(stage: int, actions: Sequence[Action], num_microbatches: int) -> None:
    """Checks the actions of one stage."""
    positions: dict[Action, int] = {}
    for position, action in enumerate(actions):
        if not 0 <= action.microbatch < num_microbatches:
            last = num_microbatches - 1
            raise ValueError(f"stage {stage}, {action}: the microbatches are 0 to {last}")
        if action in positions:
            raise ValueError(f"stage {stage}, {action}: runs twice")
        positions[action] = position
    for microbatch in range(num_microbatches):
        path = _path(stage, positions, microbatch)
        for before, after in pairwise(path):
            if positions[after] < positions[before]:
                raise ValueError(f"stage {stage}, {after}: runs before {before}")


def _path(stage: int, positions: Mapping[Action, int], microbatch: int) -> list[Action]:
    """Returns the actions of a microbatch in the order they must have; checks that all are there
    and no other."""
    f, b, i, w = (Action(kind, microbatch) for kind in Kind)
    path = [f, b] if b in positions else [f, i, w]
    if not positions.keys() & {b, i, w}:
        raise ValueError(f"stage {stage}, {b}: never runs, nor do {i} and {w}")
    for action in path:
        if action not in positions:
            raise ValueError(f"stage {stage}, {action}: never runs")
    for action in (i, w):
        if b in positions and action in positions:
            raise ValueError(f"stage {stage}, {action}: runs although {b} does all of backward")
    return path


def _check_order(
    kinds: Sequence[Kind], fault: str, first: int, then: int, orders: Sequence[Sequence[Action]]
) -> None:
    """Checks that stage `then` visits microbatches as `first` does, in actions of these kinds."""
    pairs = ([a for a in orders[stage] if a.kind in kinds] for stage in (first, then))
    for theirs, ours in zip(*pairs, strict=True):
        if theirs.microbatch != ours.microbatch:
            raise ValueError(f"stage {then}, {ours}: " + fault.format(theirs=theirs, first=first))
