"""The fp32 masters of a stage's weights, and their update from the gradients.

A compute copy is a weight in the compute type; forward and backward use these copies.

The same classes serve every combination of compute type (fp32, fp16, bf16), algorithm (AdamW, 8-bit
AdamW), offload to the host, and sharding over the replicas. The combinations differ in the memory
that holds a master and in the replica that updates the master. Offload and sharding do not change
the computation of an update, so they do not change the weights.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from data_parallel.replica_gradients import ReplicaGradients
from data_parallel.zero_partition import ZeroPartition
from monitor.profiling.tracer import NO_TRACER, Tracer, Track
from optimizer.adam import Algorithm
from optimizer.offload import HostCopies, to_host


class MixedPrecisionWeights:
    """The fp32 masters and the compute copies of a stage's weights.

    The constructor casts the weights to `dtype`. A master is the fp32 tensor from before the cast
    or, with offload, a copy of this tensor in host memory. `masters` holds the masters of the
    weights that this replica updates, by name.

    Args:
        parameters: the weights of a stage by name, in fp32; the cast makes them compute copies.
        partition: the replicas that update each weight.
        dtype: the type of the compute copies.
        offload: whether the masters are in host memory.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        partition: ZeroPartition,
        *,
        dtype: torch.dtype,
        offload: bool,
    ) -> None:
        self.parameters, self.offload = dict(parameters), offload
        self.has_own_masters = dtype != torch.float32
        self.masters: dict[str, Tensor] = {
            name: to_host(parameters[name].data) if offload else parameters[name].data
            for name in partition.owned
        }
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)

    def refresh(self, names: Collection[str]) -> None:
        """Copies masters to their compute copies, unless both are the same tensors.

        The host does not wait for a GPU. With offload, a master must not change until its copy has
        arrived on the GPU. Before a master changes, `HostCopies.of` waits for all earlier work
        of the GPU, and so for these copies.
        """
        if not names or not (self.has_own_masters or self.offload):
            return
        copies, masters = ([of[name] for name in names] for of in (self.parameters, self.masters))
        if not self.offload:
            torch._foreach_copy_(copies, masters)
            return
        for copy, master in zip(copies, masters, strict=True):
            if copy.dtype != master.dtype:
                # A copy to another device that also converts would convert on the host, and wait.
                # So the GPU converts; its memory for the fp32 copy is free before the next copy.
                master = master.to(copy.device, non_blocking=True)
            copy.copy_(master, non_blocking=True)


class MixedPrecisionOptimizer:
    """The optimizer of a stage: it updates the masters, and holds the moments of the masters.

    Args:
        weights: the masters and compute copies.
        gradients: the gradients of the compute copies, after the exchange between replicas.
        algorithm: the algorithm that updates weights.
        weight_decay: the weight decay of matrices; it is 0 for biases and norms.
        tracer: records how long updates take.
    """

    def __init__(
        self,
        weights: MixedPrecisionWeights,
        gradients: ReplicaGradients,
        algorithm: Algorithm,
        *,
        weight_decay: float,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._weights, self.gradients, self.algorithm = weights, gradients, algorithm
        self._weight_decay, self._tracer = weight_decay, tracer
        self.updates = 0
        self.partition, self.names = gradients.partition, gradients.partition.names
        self.masters, self.has_own_masters = weights.masters, weights.has_own_masters
        self.moments = {name: algorithm.empty_state(m) for name, m in self.masters.items()}
        sizes = [weights.parameters[name].numel() for name in self.names]
        device = gradients.buffer.flat.device
        self._copies = HostCopies(max(sizes), device) if weights.offload else None

    @torch.no_grad()
    def step(self, *, lr: float, factor: float) -> None:
        """Updates all weights with the gradients times `factor`; then sets the gradients to 0."""
        owned = sum(master.numel() for master in self.masters.values())
        with self._tracer.span(Track.OPTIMIZER_COMP, size=owned):
            self._step_owned(lr=lr, factor=factor)
            self.gradients.buffer.zero_()
        self.updates += 1
        self.gradients.after_update()

    def _step_owned(self, *, lr: float, factor: float) -> None:
        views = self.gradients.buffer.views
        if self._copies is None:
            for is_decayed in (True, False):
                names = [n for n, m in self.masters.items() if self._is_decayed(m) == is_decayed]
                self._update(names, [views[name] for name in names], lr=lr, factor=factor)
            return
        copies = self._copies.of([views[name] for name in self.masters])
        for name, copy in zip(self.masters, copies, strict=True):
            self._update([name], [copy], lr=lr, factor=factor)

    def _update(
        self, names: Sequence[str], gradients: Sequence[Tensor], *, lr: float, factor: float
    ) -> None:
        """Updates masters with the same weight decay, and their compute copies."""
        if not names:
            return
        masters = [self.masters[name] for name in names]
        self.algorithm.step(
            masters,
            gradients,
            [self.moments[name] for name in names],
            factor=factor,
            lr=lr,
            weight_decay=self._weight_decay if self._is_decayed(masters[0]) else 0.0,
            update=self.updates,
        )
        self._weights.refresh(names)

    @staticmethod
    def _is_decayed(master: Tensor) -> bool:
        return master.dim() >= 2

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Copies the masters to the compute copies on all replicas, after masters were loaded."""
        self._weights.refresh(list(self.masters))
        self.gradients.share_weights()

    def weight_of(self, name: str) -> Tensor:
        """Returns the compute copy of a weight; every replica has a copy."""
        return self._weights.parameters[name].data
