"""Checks of a schedule before it runs, and its largest number of microbatches in flight.

F, B, I and W are the values of `Kind`: forward, backward, input gradient and weight gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from pipeline_parallel.schedule.dependencies import execution_order
from pipeline_parallel.schedule.schedules import Action, Kind, Schedule

BACKWARD_BEGINS = (Kind.BACKWARD, Kind.INPUT_GRADIENT)
BACKWARD_ENDS = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)

OUT_OF_TURN = "would receive the message of {theirs} of stage {first}, which is sent earlier"
SUMS = "stage {first} runs {theirs} at this position: gradients would be summed in another order"


def check_schedule(schedule: Schedule, num_stages: int, num_microbatches: int) -> None:
    """Raises ValueError if a schedule cannot run on `num_stages` stages.

    A schedule must have these properties:

    - Each stage runs forward of each microbatch once, and then backward once: B, or I and later W.
    - Each stage's actions need activations and gradients in the order in which its neighbours send
      them, because a message cannot overtake an earlier one.
    - All stages add the gradients of the microbatches in the same order.
    - No stage waits for a message that is never sent, and the stages do not deadlock.

    The error text names stage, action and problem.
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
    """Returns the largest number of microbatches in flight at the same time on `stage`.

    A microbatch is in flight from the start of F to the end of B or W. Without recompute, the
    memory holds the activations of all microbatches in flight.
    """
    return _peak(schedule(stage, num_stages, num_microbatches), (Kind.FORWARD,))


def peak_recomputed(schedule: Schedule, stage: int, num_stages: int, num_microbatches: int) -> int:
    """Returns the largest number of microbatches with recomputed activations in memory on `stage`.

    The action B recomputes and frees activations block by block. The action I recomputes the
    activations of all blocks of the stage, and they stay in memory until W ends.
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
    """Raises ValueError unless a stage runs the actions of each microbatch once and in order."""
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
    """Returns the actions of a microbatch in the required order: F and B, or F, I and W.

    `positions` are the positions of the stage's actions. Raises ValueError if an action of the
    microbatch is missing, or if both B and one of its parts are present.
    """
    f, b, i, w = (Action(kind, microbatch) for kind in Kind)
    path = [f, b] if b in positions else [f, i, w]
    if not positions.keys() & {b, i, w}:
        raise ValueError(f"stage {stage}, {b}: never runs, and {i} and {w} never run")
    for action in path:
        if action not in positions:
            raise ValueError(f"stage {stage}, {action}: never runs")
    for action in (i, w):
        if b in positions and action in positions:
            raise ValueError(
                f"stage {stage}, {action}: runs, but {b} is already the complete backward"
            )
    return path


def _check_order(
    kinds: Sequence[Kind], fault: str, first: int, then: int, orders: Sequence[Sequence[Action]]
) -> None:
    """Raises ValueError if the stages `first` and `then` run microbatches in different orders.

    Only actions of the given kinds are compared. `fault` is a template of the error text.
    """
    pairs = ([a for a in orders[stage] if a.kind in kinds] for stage in (first, then))
    for theirs, ours in zip(*pairs, strict=True):
        if theirs.microbatch != ours.microbatch:
            raise ValueError(f"stage {then}, {ours}: " + fault.format(theirs=theirs, first=first))
