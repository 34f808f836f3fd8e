"""The fp32 masters of a stage's weights, and the copies that forward and backward compute with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from data_parallel.zero_partition import ZeroPartition
from optimizer.offload import to_host


class MixedPrecisionWeights:
    """Masters, by name in `masters`, of the weights that this replica steps.

    A master is the fp32 weight itself, or a copy of it on the host; the compute copies are made
    after the masters.

    Args:
        parameters: a stage's weights by name, in fp32; they become the compute copies.
        partition: the replicas that step each weight.
        dtype: the type of the compute copies.
        offload: masters lie in host memory.
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
        self.have_masters = dtype != torch.float32
        self.masters: dict[str, Tensor] = {
            name: to_host(parameters[name].data) if offload else parameters[name].data
            for name in partition.owned
        }
        for parameter in parameters.values():
            parameter.data = parameter.data.to(dtype)

    def refresh(self, name: str) -> None:
        """Copies a master to its compute copy, unless both are one tensor."""
        if self.have_masters or self.offload:
            self.parameters[name].data.copy_(self.masters[name], non_blocking=True)
