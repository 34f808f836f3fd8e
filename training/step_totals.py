"""Totals of an iteration over all processes: loss, tokens, gradient norm, requests to stop.

Each number has a slot that one process fills and all others leave zero. One all-reduce therefore
gives exact sums, which are added in one order, so that nothing depends on P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from comm.communicator import Communicator
from comm.lifecycle.stop_signals import StopCause
from comm.topology import Topology
from modules.build import parameter_names
from modules.families.base import Family
from monitor.profiling.tracer import NO_TRACER, Tracer, Track
from pipeline_parallel.partition.split import stage_modules

_SIGNALS = 128  # more than a system has


class StepTotals(NamedTuple):
    """What all processes agree on.

    `loss` is the sum of token losses over `tokens` trained tokens; `squared_norm` that of the
    gradients over all stages, or None where none was asked for; `first_bad` the number of the first
    parameter, over all stages, whose gradient is not finite; `asked` what the first of the ranks
    that know of a request to stop knows of it; `writing` whether any process still writes a
    checkpoint.
    """

    loss: float
    tokens: int
    squared_norm: float | None
    first_bad: int | None
    asked: StopCause | None = None
    writing: bool = False


class TotalsReducer:
    """`norm_slots` counts the parameters of all stages; this stage's begin at `first_slot`."""

    def __init__(
        self,
        control: Communicator,
        topology: Topology,
        *,
        norm_slots: int,
        first_slot: int,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._control, self._topology, self._tracer = control, topology, tracer
        self._norm_slots, self._first_slot = norm_slots, first_slot

    def agree(
        self,
        *,
        loss: float,
        tokens: int,
        squared_norms: Sequence[float] | None,
        asked: StopCause | None = None,
        writing: bool = False,
    ) -> StepTotals:
        """Sums over all processes; every one calls it alike, those without a loss give 0 and 0.

        `squared_norms` are those of this stage's parameters, in order, after the replicas' sum; 0
        for those that another replica speaks for. `asked` is the request to stop that this process
        knows of; `writing` whether it still writes a checkpoint.
        """
        replicas, replica = self._topology.num_replicas, self._topology.replica
        norm_slots = 0 if squared_norms is None else self._norm_slots
        before_norms = 2 * replicas + self._topology.world_size + 1
        slots = torch.zeros(before_norms + norm_slots, dtype=torch.float64)
        slots[2 * replicas + self._topology.rank] = _code(asked)
        slots[before_norms - 1] = writing
        if self._topology.is_last:
            slots[2 * replica], slots[2 * replica + 1] = loss, tokens
        if squared_norms is not None:
            start = before_norms + self._first_slot
            slots[start : start + len(squared_norms)] = torch.tensor(
                squared_norms, dtype=torch.float64
            )
        with self._tracer.span(Track.OPTIMIZER_COMM, size=slots.numel()):
            self._control.all_reduce(slots).wait()
        values = slots.tolist()
        norms = values[before_norms:]
        return StepTotals(
            loss=sum(values[0 : 2 * replicas : 2]),
            tokens=round(sum(values[1 : 2 * replicas : 2])),
            squared_norm=None if squared_norms is None else sum(norms),
            first_bad=next((i for i, n in enumerate(norms) if not math.isfinite(n)), None),
            asked=_first_asked(values[2 * replicas : before_norms - 1]),
            writing=values[before_norms - 1] > 0,
        )

    def first_bad(self, finite: Sequence[bool]) -> int | None:
        """The number of the first parameter, over all stages, that any process finds not finite.

        `finite` are this stage's parameters, in order; every process calls it.
        """
        slots = torch.zeros(self._norm_slots)
        slots[self._first_slot : self._first_slot + len(finite)] = ~torch.tensor(finite)
        self._control.all_reduce(slots).wait()
        bad = slots.nonzero().flatten().tolist()
        return bad[0] if bad else None


def _code(asked: StopCause | None) -> int:
    """A number above 0 for a request, 0 for none."""
    return 0 if asked is None else asked.rank * _SIGNALS + asked.number


def _first_asked(codes: Sequence[float]) -> StopCause | None:
    return next((StopCause(*divmod(round(code), _SIGNALS)) for code in codes if code), None)


def names_by_stage(family: Family, config: Any, split: Sequence[int]) -> list[list[str]]:
    """The parameters of each stage, in the order of the layers."""
    return [
        [
            f"stage {stage}, {name}"
            for index in stage_modules(stage, split)
            for name in parameter_names(family, config, index)
        ]
        for stage in range(len(split))
    ]


def build_totals_reducer(
    names: Sequence[Sequence[str]], control: Communicator, topology: Topology, tracer: Tracer
) -> TotalsReducer:
    """`names` are those of `names_by_stage`."""
    counts = [len(of_stage) for of_stage in names]
    return TotalsReducer(
        control,
        topology,
        norm_slots=sum(counts),
        first_slot=sum(counts[: topology.stage]),
        tracer=tracer,
    )
