"""How long a schedule takes, given what its actions and messages cost.

Timed as the engine runs it: a stage runs its actions one after another, each as soon as the stage
is free and the message that it needs, if any, has arrived. Sending does not hold up the sender; a
link carries one message at a time each way, so that a slow link makes a queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pipeline_parallel.schedule.dependencies import Transfer, makes, needs, replay
from pipeline_parallel.schedule.schedules import Action, Kind, Schedule
from pipeline_parallel.schedule.validate import peak_live


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
    """What each stage's actions take, and a message between two neighbours, in seconds.

    Messages take the same on all links, or, in a list, on link i between the stages i and i + 1
    what stands there. Raises ValueError for what is negative or not finite, and for a list of
    another length.
    """

    stages: Sequence[StageCosts]
    activation_seconds: float | Sequence[float] = 0.0
    gradient_seconds: float | Sequence[float] = 0.0

    def __post_init__(self) -> None:
        for stage, costs in enumerate(self.stages):
            for kind in Kind:
                _check_seconds(f"stage {stage}, {kind.name.lower()}", costs[kind])
        for name in ("activation_seconds", "gradient_seconds"):
            given = getattr(self, name)
            if isinstance(given, Sequence) and len(given) != len(self.stages) - 1:
                raise ValueError(
                    f"{name}: expected {len(self.stages) - 1}, one for each link, got {len(given)}"
                )
            for seconds in given if isinstance(given, Sequence) else (given,):
                _check_seconds(name, seconds)

    def message_seconds(self, message: Transfer) -> float:
        """What `message` takes on its link."""
        given = self.gradient_seconds if message.is_gradient else self.activation_seconds
        if not isinstance(given, Sequence):
            return given
        return given[message.source - 1 if message.is_gradient else message.source]


class ScheduledAction(NamedTuple):
    """One action of one stage, from `start` to `end` in seconds since the first action began."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class SimulatedRun:
    """When everything runs; `spans` has each stage's actions in order, stage by stage.

    `exposed` is, for each stage, the seconds it stood idle while what it waited for was already
    made and on its way. What such a delay costs other stages later is part of their bubble alone.
    `peak_live` is, for each stage, the most microbatches held at once (see `validate.peak_live`).
    """

    spans: tuple[ScheduledAction, ...]
    exposed: tuple[float, ...]
    peak_live: tuple[int, ...]

    @property
    def total(self) -> float:
        """Seconds until the last stage to end has ended."""
        return max((span.end for span in self.spans), default=0.0)

    @property
    def bubble(self) -> float:
        """The share, 0 to 1, of all stages' time in which they run nothing."""
        if self.total == 0:
            return 0.0
        busy = math.fsum(span.end - span.start for span in self.spans)
        return 1 - busy / (len(self.peak_live) * self.total)


def simulate(
    schedule: Schedule, num_stages: int, num_microbatches: int, costs: Costs
) -> SimulatedRun:
    """The timeline of a schedule that passes `check_schedule`, or of `forward_only`.

    Raises ValueError where it deadlocks, or `costs` has another number of stages.
    """
    if len(costs.stages) != num_stages:
        raise ValueError(f"expected the costs of {num_stages} stages, got {len(costs.stages)}")
    stages = range(num_stages)
    clock = _Clock(costs)
    for stage, action in replay([list(schedule(s, num_stages, num_microbatches)) for s in stages]):
        clock.run(stage, action)
    return SimulatedRun(
        spans=tuple(sorted(clock.spans, key=lambda span: span.stage)),
        exposed=tuple(clock.exposed),
        peak_live=tuple(peak_live(schedule, s, num_stages, num_microbatches) for s in stages),
    )


class _Arrival(NamedTuple):
    made: float
    arrived: float


class _Clock:
    """When each stage and link is free again, as actions are put on them in the replay's order."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._free = [0.0] * len(costs.stages)
        self._link_free: dict[tuple[int, bool], float] = {}
        self._arrivals: dict[Transfer, _Arrival] = {}
        self.exposed = [0.0] * len(costs.stages)
        self.spans: list[ScheduledAction] = []

    def run(self, stage: int, action: Action) -> None:
        num_stages, free = len(self._free), self._free[stage]
        start = free
        needed = needs(stage, action, num_stages)
        if needed is not None:
            made, arrived = self._arrivals[needed]
            start = max(free, arrived)
            self.exposed[stage] += start - min(start, max(free, made))
        end = start + self._costs.stages[stage][action.kind]
        self.spans.append(ScheduledAction(stage, action, start, end))
        self._free[stage] = end
        message = makes(stage, action, num_stages)
        if message is not None:
            self._send(message, end)

    def _send(self, message: Transfer, made: float) -> None:
        link = (message.source, message.is_gradient)
        arrived = max(made, self._link_free.get(link, 0.0)) + self._costs.message_seconds(message)
        self._link_free[link] = arrived
        self._arrivals[message] = _Arrival(made, arrived)


def _check_seconds(what: str, seconds: float) -> None:
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{what}: expected seconds of at least 0, got {seconds}")
