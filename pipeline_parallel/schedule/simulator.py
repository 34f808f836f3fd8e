"""Simulation of the time that a schedule takes, from the seconds of its actions and messages.

The simulation does what the engine does. A stage runs its actions one after another. An action
starts when the stage is free and the message for the action has arrived. A send does not delay the
sender. A link carries one message at a time in each direction, so messages queue on a slow link.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline_parallel.schedule.dependencies import Transfer, execution_order, received, sent
from pipeline_parallel.schedule.schedules import Action, Kind, Schedule
from pipeline_parallel.schedule.validate import peak_in_flight


@dataclass(frozen=True)
class StageCosts:
    """Seconds of each action of a microbatch on a stage.

    If `backward` is None, it is the sum of `input_gradient` and `weight_gradient`.
    """

    forward: float
    input_gradient: float
    weight_gradient: float
    backward: float | None = None

    def __getitem__(self, kind: Kind) -> float:
        if kind is Kind.BACKWARD and self.backward is None:
            return self.input_gradient + self.weight_gradient
        seconds: float = getattr(self, kind.name.lower())
        return seconds


@dataclass(frozen=True)
class Costs:
    """Seconds of the actions of each stage, and of a message between two neighbouring stages.

    The seconds of a message are the same number for all links, or a list with a number for each
    link; link i is between the stages i and i + 1.

    Raises:
        ValueError: a number is negative or not finite, or the length of a list is wrong.
    """

    stages: Sequence[StageCosts]
    activation_seconds: float | Sequence[float] = 0.0
    gradient_seconds: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for stage, costs in enumerate(self.stages):
            for kind in Kind:
                _check_seconds(f"stage {stage}, {kind.name.lower()}", costs[kind])
        for name in ("activation_seconds", "gradient_seconds"):
            cost = getattr(self, name)
            if isinstance(cost, Sequence) and len(cost) != len(self.stages) - 1:
                raise ValueError(
                    f"{name}: expected {len(self.stages) - 1} numbers, one for each link, "
                    f"got {len(cost)}"
                )
            for seconds in cost if isinstance(cost, Sequence) else (cost,):
                _check_seconds(name, seconds)

    def message_seconds(self, message: Transfer) -> float:
        """Returns the seconds that a message takes on its link."""
        cost = self.gradient_seconds if message.is_gradient else self.activation_seconds
        if not isinstance(cost, Sequence):
            return cost
        return cost[message.source - 1 if message.is_gradient else message.source]


class ScheduledAction(NamedTuple):
    """One action of one stage, from `start` to `end` in seconds since the first action began."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class SimulatedRun:
    """The times of all actions, and the largest number of microbatches in flight on each stage.

    The actions are sorted by stage.
    """

    actions: tuple[ScheduledAction, ...]
    peak_in_flight: tuple[int, ...]

    @property
    def total(self) -> float:
        """Returns the seconds until all stages have ended."""
        return max((action.end for action in self.actions), default=0.0)

    @property
    def bubble(self) -> float:
        """Returns the stages' mean idle time as a fraction (0 to 1) of `total`."""
        if self.total == 0:
            return 0.0
        busy = math.fsum(action.end - action.start for action in self.actions)
        return 1 - busy / (len(self.peak_in_flight) * self.total)


def simulate(
    schedule: Schedule, num_stages: int, num_microbatches: int, costs: Costs
) -> SimulatedRun:
    """Simulates a schedule, and returns the times of its actions.

    The schedule must be `forward_only`, or one that `check_schedule` accepts. `simulate` does not
    check this, but it finds deadlocks.

    Raises:
        ValueError: the schedule deadlocks, or `costs` is not for `num_stages` stages.
    """
    if len(costs.stages) != num_stages:
        raise ValueError(f"expected the costs of {num_stages} stages, got {len(costs.stages)}")
    stages = range(num_stages)
    clock = _Clock(costs)
    orders = [list(schedule(s, num_stages, num_microbatches)) for s in stages]
    for stage, action in execution_order(orders):
        clock.run(stage, action)
    return SimulatedRun(
        tuple(sorted(clock.actions, key=lambda action: action.stage)),
        tuple(peak_in_flight(schedule, s, num_stages, num_microbatches) for s in stages),
    )


class _Clock:
    """The simulated time at which each stage and each link is free again.

    `run` must get the actions of all stages in execution order.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._free = [0.0] * len(costs.stages)
        self._link_free: dict[tuple[int, bool], float] = {}
        self._arrivals: dict[Transfer, float] = {}
        self.actions: list[ScheduledAction] = []

    def run(self, stage: int, action: Action) -> None:
        start = self._free[stage]
        needed = received(stage, action, len(self._free))
        if needed is not None:
            start = max(start, self._arrivals[needed])
        end = start + self._costs.stages[stage][action.kind]
        self.actions.append(ScheduledAction(stage, action, start, end))
        self._free[stage] = end
        message = sent(stage, action, len(self._free))
        if message is not None:
            link = (message.source, message.is_gradient)
            departure = max(end, self._link_free.get(link, 0.0))
            arrival = departure + self._costs.message_seconds(message)
            self._link_free[link] = self._arrivals[message] = arrival


def _check_seconds(name: str, seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name}: expected seconds of at least 0, got {seconds}")
