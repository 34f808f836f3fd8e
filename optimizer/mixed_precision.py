"""The update of one stage's weights: fp32 masters, their compute copies, gradients and moments.

One class for every combination of compute type (fp32, fp16, bf16), algorithm (AdamW, 8-bit
AdamW), offload to the host and sharding over the replicas. What differs is where a master lies and
who steps it; how it is stepped is the same, so the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from comm.communicator import Communicator
from data_parallel.broadcast import broadcast_pieces
from data_parallel.grad_buffer import BUCKET_BYTES, GradBuffer
from monitor.profiling.tracer import NO_TRACER, Tracer, Track
from optimizer.offload import HostCopies, to_host


class Algorithm(Protocol):
    """How one weight is stepped; `optimizer.adam` and `optimizer.adam_8bit` are such."""

    @property
    def kind(self) -> str: ...

    def empty_state(self, weight: Tensor) -> dict[str, Tensor]: ...

    def step(
        self,
        weight: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        *,
        factor: float,
        lr: float,
        weight_decay: float,
        update: int,
    ) -> None: ...


class MixedPrecisionOptimizer:
    """Steps `parameters` (by name, given in fp32), which become compute copies of type `dtype`.

    offload: masters and moments lie in host memory.
    sharded: each weight is stepped by one replica (`owners`), which alone holds its master and
    moments; otherwise every replica steps every weight.
    weight_decay: of matrices; biases and norms have none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        algorithm: Algorithm,
        *,
        dtype: torch.dtype,
        weight_decay: float,
        offload: bool,
        sharded: bool,
        replicas: Communicator,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.names = list(parameters)
        self.algorithm = algorithm
        self.updates = 0
        self.sharded = sharded
        self._parameters, self._replicas = dict(parameters), replicas
        self._dtype, self._weight_decay, self._tracer = dtype, weight_decay, tracer
        sizes = [parameter.numel() for parameter in parameters.values()]
        self._num_elements = sum(sizes)
        dealt = deal_out(sizes, replicas.size) if sharded else [replicas.rank] * len(sizes)
        self.owners = dict(zip(self.names, dealt, strict=True))
        device = next(iter(parameters.values())).device
        self._copies = HostCopies(max(sizes), device) if offload else None
        self.masters = {name: self._make_master(name) for name in self.owned}
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)
        self.moments = {name: algorithm.empty_state(m) for name, m in self.masters.items()}
        self.flat_gradients = GradBuffer(parameters, dealt, replicas=replicas, sharded=sharded)

    @property
    def owned(self) -> list[str]:
        """The weights that this process steps."""
        return [name for name in self.names if self.owners[name] == self._replicas.rank]

    @property
    def has_own_masters(self) -> bool:
        """Whether masters hold more than the compute weights do."""
        return self._dtype != torch.float32

    def begin_update(self, num_microbatches: int) -> None:
        """An update of so many microbatches begins; its gradients are zero by now."""
        self.flat_gradients.begin(num_microbatches)

    def reduce_gradients(self) -> None:
        """Waits until the replicas' gradients are summed, where they are to be stepped."""
        with self._tracer.span(Track.OPTIMIZER_COMM, size=self._num_elements):
            self.flat_gradients.finish()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The summed gradients that this process speaks for; each has one replica that does."""
        for name in self.names:
            speaks = self.owners[name] if self.sharded else 0
            if speaks == self._replicas.rank:
                yield name, self.flat_gradients.views[name]

    @torch.no_grad()
    def step(self, *, lr: float, factor: float) -> None:
        """One update from the gradients times `factor`, which are gone after it."""
        owned = sum(master.numel() for master in self.masters.values())
        with self._tracer.span(Track.OPTIMIZER_COMP, size=owned):
            self._step_owned(lr=lr, factor=factor)
            self.flat_gradients.zero_()
        self.updates += 1
        self.share_weights()

    def _step_owned(self, *, lr: float, factor: float) -> None:
        gradients = [self.flat_gradients.views[name] for name in self.owned]
        copies = gradients if self._copies is None else self._copies.of(gradients)
        for name, gradient in zip(self.owned, copies, strict=True):
            master = self.masters[name]
            self.algorithm.step(
                master,
                gradient,
                self.moments[name],
                factor=factor,
                lr=lr,
                weight_decay=self._weight_decay if master.dim() >= 2 else 0.0,
                update=self.updates,
            )
            self._give_weight(name)

    def drop_gradients(self) -> None:
        """Forgets the gradients: the update is skipped."""
        self.flat_gradients.zero_()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Makes all compute weights anew from the masters, after these were filled."""
        for name in self.owned:
            self._give_weight(name)
        self.share_weights()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Gives every replica the compute weights that the others have stepped."""
        if not self.sharded or self._replicas.size == 1:
            return
        with self._tracer.span(Track.OPTIMIZER_COMM, size=self._num_elements):
            self._share_owned()

    def _share_owned(self) -> None:
        for owner in range(self._replicas.size):
            names = [name for name in self.names if self.owners[name] == owner]
            weights = [self._parameters[name].data for name in names]
            broadcast_pieces(weights, self._replicas, root=owner, limit=BUCKET_BYTES)

    def weight_of(self, name: str) -> Tensor:
        """The compute weight, which every replica has."""
        return self._parameters[name].data

    def shape_of(self, name: str) -> torch.Size:
        return self._parameters[name].shape

    def _make_master(self, name: str) -> Tensor:
        """The fp32 weight itself where it may lie with the compute weight, else a copy on the host.

        A half-precision compute copy is made after this, and leaves the fp32 weight to the master.
        """
        weight = self._parameters[name].data
        return weight if self._copies is None else to_host(weight)

    def _give_weight(self, name: str) -> None:
        if self.has_own_masters or self._copies is not None:
            self._parameters[name].data.copy_(self.masters[name], non_blocking=True)


def deal_out(sizes: Sequence[int], num_owners: int) -> list[int]:
    """The owner of each weight, so that all own about as much: the largest first, each to whoever
    owns least so far. The same on all processes."""
    totals, owners = [0] * num_owners, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = totals.index(min(totals))
        owners[index] = owner
        totals[owner] += sizes[index]
    return owners
