"""The update of a stage's weights from their gradients.

One class for every combination of compute type (fp32, fp16, bf16), algorithm (AdamW, 8-bit
AdamW), offload to the host and sharding over the replicas. They differ in where a master lies and
in which replica steps it; the step is the same, so the numbers are the same.
"""

import torch
from torch import Tensor

from data_parallel.replica_gradients import ReplicaGradients
from monitor.profiling.tracer import NO_TRACER, Tracer, Track
from optimizer.adam import Algorithm
from optimizer.offload import HostCopies
from optimizer.weights import MixedPrecisionWeights


class MixedPrecisionOptimizer:
    """Steps the masters of a stage's weights, and holds their moments.

    Args:
        weights: masters and compute copies.
        gradients: the gradients of the compute copies, which the replicas have exchanged.
        algorithm: steps one weight.
        weight_decay: of matrices; biases and norms have none.
        tracer: records how long steps take.
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
        self.masters = weights.masters
        self.moments = {name: algorithm.empty_state(m) for name, m in self.masters.items()}
        sizes = [weights.parameters[name].numel() for name in self.names]
        device = gradients.buffer.flat.device
        self._copies = HostCopies(max(sizes), device) if weights.offload else None

    @property
    def has_own_masters(self) -> bool:
        """Whether masters hold more than the compute copies do."""
        return self._weights.have_masters

    @torch.no_grad()
    def step(self, *, lr: float, factor: float) -> None:
        """Updates all weights from the gradients times `factor`, and zeroes the gradients."""
        owned = sum(master.numel() for master in self.masters.values())
        with self._tracer.span(Track.OPTIMIZER_COMP, size=owned):
            self._step_owned(lr=lr, factor=factor)
            self.gradients.buffer.zero_()
        self.updates += 1
        self.gradients.after_update()

    def _step_owned(self, *, lr: float, factor: float) -> None:
        gradients = [self.gradients.buffer.views[name] for name in self.masters]
        copies = gradients if self._copies is None else self._copies.of(gradients)
        for (name, master), gradient in zip(self.masters.items(), copies, strict=True):
            self.algorithm.step(
                master,
                gradient.mul_(factor),
                self.moments[name],
                lr=lr,
                weight_decay=self._weight_decay if master.dim() >= 2 else 0.0,
                update=self.updates,
            )
            self._weights.refresh(name)

    @torch.no_grad()
    def refresh_weights(self) -> None:
        """Makes all compute copies anew, on all replicas, after the masters were loaded."""
        for name in self.masters:
            self._weights.refresh(name)
        self.gradients.share_weights()

    def weight_of(self, name: str) -> Tensor:
        """Returns the compute copy of a weight, which every replica has."""
        return self._weights.parameters[name].data

    def shape_of(self, name: str) -> torch.Size:
        """Returns the shape of a weight."""
        return self._weights.parameters[name].shape
