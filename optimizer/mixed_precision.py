"""The update of one stage's weights: fp32 masters, their compute copies, gradients and moments.

One class for every combination of compute type (fp32, fp16, bf16), algorithm (AdamW, 8-bit
AdamW), offload to the host and sharding over the replicas. What differs is where a master lies and
who steps it; how it is stepped is the same, so the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from comm.communicator import Communicator
from data_parallel.flat_gradients import FlatGradients
from optimizer.offload import HostCopies, to_host
from optimizer.ownership import deal_out

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Algorithm(Protocol):
    """How one weight is stepped; `optimizer.adam` and `optimizer.adam_8bit` are such."""

    @property
    def kind(self) -> str: ...

    def empty_state(self, weight: Tensor) -> dict[str, Tensor]: ...

    def step(
        self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], *, lr: float,
        weight_decay: float, update: int,
    ) -> None: ...  # fmt: skip


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
    ) -> None:
        self.names = list(parameters)
        self.algorithm = algorithm
        self.updates = 0
        self.sharded = sharded
        self._parameters, self._replicas = dict(parameters), replicas
        self._dtype, self._weight_decay = dtype, weight_decay
        sizes = [parameter.numel() for parameter in parameters.values()]
        dealt = deal_out(sizes, replicas.size) if sharded else [replicas.rank] * len(sizes)
        self.owners = dict(zip(self.names, dealt, strict=True))
        device = next(iter(parameters.values())).device
        self._copies = HostCopies(max(sizes), device) if offload else None
        self.masters = {name: self._make_master(name) for name in self.owned}
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)
        self.moments = {name: algorithm.empty_state(m) for name, m in self.masters.items()}
        self._gradients = FlatGradients(parameters, dealt)

    @property
    def owned(self) -> list[str]:
        """The weights that this process steps."""
        return [name for name in self.names if self.owners[name] == self._replicas.rank]

    @property
    def has_own_masters(self) -> bool:
        """Whether masters hold more than the compute weights do."""
        return self._dtype != torch.float32

    def reduce_gradients(self) -> None:
        """Sums the gradients over the replicas, where they are to be stepped."""
        if self.sharded:
            self._gradients.reduce_to_owners(self._replicas)
        else:
            self._gradients.all_reduce(self._replicas)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The summed gradients that this process speaks for; each has one replica that does."""
        for name in self.names:
            speaks = self.owners[name] if self.sharded else 0
            if speaks == self._replicas.rank:
                yield name, self._gradients.views[name]

    @torch.no_grad()
    def step(self, *, lr: float, factor: float) -> None:
        """One update from the gradients times `factor`, which are gone after it."""
        self._gradients.scale_(factor)
        gradients = [self._gradients.views[name] for name in self.owned]
        copies = gradients if self._copies is None else self._copies.of(gradients)
        for name, gradient in zip(self.owned, copies, strict=True):
            master = self.masters[name]
            self.algorithm.step(
                master,
                gradient,
                self.moments[name],
                lr=lr,
                weight_decay=self._weight_decay if master.dim() >= 2 else 0.0,
                update=self.updates,
            )
            self._give_weight(name)
        self.updates += 1
        self.share_weights()
        self._gradients.zero_()

    def drop_gradients(self) -> None:
        """Forgets the gradients: the update is skipped."""
        self._gradients.zero_()

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Makes all compute weights anew from the masters, after these were filled."""
        for name in self.owned:
            self._give_weight(name)
        self.share_weights()

    @torch.no_grad()
    def share_weights(self) -> None:
        """Gives every replica the compute weights that the others have stepped."""
        if not self.sharded:
            return
        for owner in range(self._replicas.size):
            weights = [self._parameters[n].data for n in self.names if self.owners[n] == owner]
            if weights:
                flat = torch.cat([weight.flatten() for weight in weights])
                self._replicas.broadcast(flat, root=owner)
                parts = torch.split(flat, [weight.numel() for weight in weights])
                for weight, part in zip(weights, parts, strict=True):
                    weight.copy_(part.view_as(weight))

    def shape_of(self, name: str) -> torch.Size:
        return self._parameters[name].shape

    def _make_master(self, name: str) -> Tensor:
        """The fp32 weight itself where it may lie with the compute weight, else a copy on the host.

        A half-precision compute copy is made after this, and leaves the fp32 weight to the master.
        """
        weight = self._parameters[name].data
        return weight if self._copies is None else to_host(weight)

    def _give_weight(self, name: str) -> None:
        weight, master = self._parameters[name].data, self.masters[name]
        if weight.data_ptr() != master.data_ptr():
            weight.copy_(master, non_blocking=True)
