"""All gradients of a stage in one buffer, so that replicas exchange one long message."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from comm.communicator import Communicator

ALIGNMENT = 16  # elements: every gradient starts on a 64-byte boundary


class FlatGradients:
    """One fp32 buffer; each parameter's `.grad` is a view of it, into which backward adds.

    `views` are those gradients, in the order of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        self.buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=parameters[0].device)
        self.views: list[Tensor] = []
        offset = 0
        for parameter, size in zip(parameters, sizes, strict=True):
            view = self.buffer[offset : offset + parameter.numel()].view_as(parameter)
            parameter.grad = view
            self.views.append(view)
            offset += size

    def zero_(self) -> None:
        self.buffer.zero_()

    def scale_(self, factor: float) -> None:
        if factor != 1.0:
            self.buffer.mul_(factor)

    def all_reduce(self, replicas: Communicator) -> None:
        """Sums the buffers of all replicas into each of them."""
        replicas.all_reduce(self.buffer)


def same_on_all(tensors: Iterable[Tensor], replicas: Communicator) -> bool:
    """Whether every replica holds the same bits, by a checksum of each tensor."""
    sums = [t.contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors]
    gathered = replicas.all_gather(torch.stack(sums))
    return bool((gathered == gathered[0]).all())
