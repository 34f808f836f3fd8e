"""Totals of an iteration over all processes: loss, tokens, gradient norm, requests to stop.

Each number has its own element (slot) of a tensor. One process fills the slot, and all other
processes leave it zero. One all-reduce therefore gives every process the exact numbers. Each
process adds the numbers in the same order, so the totals do not depend on the number of stages.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comm.communicator import Communicator
from comm.lifecycle.stop_signals import StopCause
from comm.topology import Topology
from modules.build import parameter_names
from modules.families.base import Family
from monitor.profiling.tracer import NO_TRACER, Tracer, Track
from pipeline_parallel.partition.split import stage_modules


class StepTotals(NamedTuple):
    """The totals of an iteration, or of an evaluation, that all processes know.

    Attributes:
        loss: the sum of the token losses, in nats.
        tokens: the number of trained tokens.
        squared_norm: the squared norm of all stages' gradients; None if no update follows.
        first_bad: the number of the first parameter, over all stages, whose gradient is not finite.
        stop_cause: the request to stop from the lowest rank that knows of one; None if none does.
        is_writing: whether a process still writes a checkpoint.
    """

    loss: float
    tokens: int
    squared_norm: float | None
    first_bad: int | None
    stop_cause: StopCause | None = None
    is_writing: bool = False


class TotalsReducer:
    """A reducer that sums the totals over all processes, with one all-reduce of float64 slots.

    The slots are, in this order: the loss and tokens of each replica; two slots of each rank, for
    requests to stop; a flag that is positive while a process writes a checkpoint; and, if an update
    follows the iteration, the squared gradient norm of each parameter of all stages. A rank that
    knows of a request to stop writes into its own two slots which rank got the signal, and the
    number of the signal. Both numbers have 1 added, because 0 means that this rank knows of no
    request.

    Args:
        num_parameters: the number of parameters of each stage.
    """

    def __init__(
        self,
        control: Communicator,
        topology: Topology,
        *,
        num_parameters: Sequence[int],
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._control, self._topology, self.tracer = control, topology, tracer
        self._norm_slots = sum(num_parameters)
        self._first_slot = sum(num_parameters[: topology.stage])

    def reduce(
        self,
        *,
        loss: float,
        tokens: int,
        squared_norms: Sequence[float] | None,
        stop_cause: StopCause | None = None,
        is_writing: bool = False,
    ) -> StepTotals:
        """Returns the totals over all processes; every process calls it.

        Args:
            loss, tokens: the numbers of this process; 0 and 0 if this process computes no loss.
            squared_norms: a number for each parameter of this stage, in order: the squared norm of
                its gradient, which the replicas have already summed, or 0 if another replica owns
                the parameter. The whole list is None if no update follows this iteration.
            stop_cause: the request to stop that this process knows of.
            is_writing: whether this process still writes a checkpoint.
        """
        topology = self._topology
        stops = 2 * topology.num_replicas  # where the slots of requests to stop begin
        writing = stops + 2 * topology.world_size
        norms = writing + 1
        count = norms + (0 if squared_norms is None else self._norm_slots)
        slots = torch.zeros(count, dtype=torch.float64)
        if topology.is_last:
            slots[2 * topology.replica : 2 * topology.replica + 2] = _float64(loss, tokens)
        if stop_cause is not None:
            here = stops + 2 * topology.rank
            slots[here : here + 2] = _float64(stop_cause.rank + 1, stop_cause.number + 1)
        slots[writing] = is_writing
        if squared_norms is not None:
            first = norms + self._first_slot
            slots[first : first + len(squared_norms)] = _float64(*squared_norms)
        with self.tracer.span(Track.OPTIMIZER_COMM, size=slots.numel()):
            self._control.all_reduce(slots).wait()
        sums = slots.tolist()
        return StepTotals(
            loss=sum(sums[0:stops:2]),
            tokens=round(sum(sums[1:stops:2])),
            squared_norm=None if squared_norms is None else sum(sums[norms:]),
            first_bad=next((i for i, n in enumerate(sums[norms:]) if not math.isfinite(n)), None),
            stop_cause=_first_cause(sums[stops:writing]),
            is_writing=sums[writing] > 0,
        )

    def first_bad(self, finite: Sequence[bool]) -> int | None:
        """Returns the number of the first parameter, over all stages, that is not finite.

        `finite` says, for each parameter of this stage in order, whether it is finite. Returns None
        if all parameters are finite on every process. Every process calls it.
        """
        slots = torch.zeros(self._norm_slots)
        slots[self._first_slot : self._first_slot + len(finite)] = ~torch.tensor(finite)
        self._control.all_reduce(slots).wait()
        bad = slots.nonzero().flatten().tolist()
        return bad[0] if bad else None


def names_by_stage(family: Family, config: Any, split: Sequence[int]) -> list[list[str]]:
    """Returns the names of the parameters of each stage, in the order of the layers."""
    return [
        [
            f"stage {stage}, {name}"
            for index in stage_modules(stage, split)
            for name in parameter_names(family, config, index)
        ]
        for stage in range(len(split))
    ]


def _float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _first_cause(slots: Sequence[float]) -> StopCause | None:
    """Returns the first request among the pairs (rank + 1, signal + 1); (0, 0) means no request."""
    pairs = zip(slots[::2], slots[1::2], strict=True)
    return next(
        (StopCause(round(rank) - 1, round(signal) - 1) for rank, signal in pairs if rank), None
    )
