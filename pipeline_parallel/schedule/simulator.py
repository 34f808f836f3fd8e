"""Simulates how long a schedule takes, from the costs of its actions and messages.

It follows the engine: a stage runs its actions one after another, each as soon as the stage is free
and the action's message, if it has one, has arrived. A send does not delay the sender. A link
carries one message at a time each way, so messages queue on a slow link.
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
    """Seconds of one microbatch's actions on a stage; B takes I and W together, unless given."""

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
    """Seconds of each stage's actions, and of a message between two neighbours.

    The seconds of messages are one number for all links, or a list with one for each link i between
    the stages i and i + 1.

    Raises:
        ValueError: seconds are negative or not finite, or a list has another length.
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
                    f"{name}: expected {len(self.stages) - 1}, one for each link, got {len(cost)}"
                )
            for seconds in cost if isinstance(cost, Sequence) else (cost,):
                _check_seconds(name, seconds)

    def message_seconds(self, message: Transfer) -> float:
        """Returns the seconds of a message on its link."""
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
    """The times of all actions, stage by stage, and each stage's most microbatches in flight."""

    actions: tuple[ScheduledAction, ...]
    peak_in_flight: tuple[int, ...]

    @property
    def total(self) -> float:
        """Seconds until all stages have ended."""
        return max((action.end for action in self.actions), default=0.0)

    @property
    def bubble(self) -> float:
        """The share, 0 to 1, of all stages' time in which they run nothing."""
        if self.total == 0:
            return 0.0
        busy = math.fsum(action.end - action.start for action in self.actions)
        return 1 - busy / (len(self.peak_in_flight) * self.total)


def simulate(
    schedule: Schedule, num_stages: int, num_microbatches: int, costs: Costs
) -> SimulatedRun:
    """Simulates a schedule that passes `check_schedule`, or `forward_only`.

    Raises:
        ValueError: the schedule deadlocks, or `costs` has another number of stages.
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
    """The times at which each stage and link is free again; actions come in execution order."""

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
