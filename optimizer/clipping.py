"""One small reduction over all processes that ends an iteration, and one before a save.

The first brings every process the loss over all replicas and, where an update is due, the gradient
norm over all stages; and whether a rank was asked to stop, so that all stop after one iteration.
Each number has a slot of its own that one process fills and all others leave zero, so the sums are
exact; the slots are then added in one order, so nothing depends on P.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from comm.communicator import Communicator
from comm.lifecycle.stop_signals import Asked
from comm.topology import Topology
from monitor.profiling.tracer import NO_TRACER, Tracer, Track

_SIGNALS = 128  # more than a system has


class Totals(NamedTuple):
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
    asked: Asked | None = None
    writing: bool = False


class Agreement:
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
        asked: Asked | None = None,
        writing: bool = False,
    ) -> Totals:
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
        return Totals(
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


def _code(asked: Asked | None) -> int:
    """A number above 0 for a request, 0 for none."""
    return 0 if asked is None else asked.rank * _SIGNALS + asked.number


def _first_asked(codes: Sequence[float]) -> Asked | None:
    return next((Asked(*divmod(round(code), _SIGNALS)) for code in codes if code), None)


def squared_norms(gradients: Sequence[Tensor]) -> list[float]:
    """Each gradient's sum of squares, from its norm in fp32."""
    if not gradients:
        return []
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
    values: list[float] = norms.double().square().tolist()
    return values


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply gradients of norm `norm` by, as torch.nn.utils.clip_grad_norm_ does."""
    if math.isinf(max_norm):
        return 1.0
    return min(1.0, max_norm / (norm + 1e-6))
