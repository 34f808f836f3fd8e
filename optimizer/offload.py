"""Copies of gradients in host memory; while one copy is used, the next gradient is copied."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from common.tensors import pinned_empty


class _Copy(NamedTuple):
    tensor: Tensor
    arrived: torch.cuda.Event | None


class HostCopies:
    """Two host buffers of `largest` elements each; the buffers are pinned if `device` is a GPU."""

    def __init__(self, largest: int, device: torch.device) -> None:
        self._buffers = [pinned_empty((largest,), torch.float32, device) for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._device = device

    def of(self, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yields a host copy of each gradient; while the caller uses it, the next one is copied.

        A copy is valid until the next copy is yielded.
        """
        ahead = self._start(gradients[0], 0) if gradients else None
        for index in range(len(gradients)):
            current = ahead
            assert current is not None
            if index + 1 < len(gradients):
                ahead = self._start(gradients[index + 1], (index + 1) % 2)
            if current.arrived is not None:
                current.arrived.synchronize()
            yield current.tensor

    def _start(self, gradient: Tensor, buffer: int) -> _Copy:
        target = self._buffers[buffer][: gradient.numel()].view_as(gradient)
        if self._stream is None:
            return _Copy(target.copy_(gradient), None)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(gradient, non_blocking=True)
        return _Copy(target, self._stream.record_event())


def to_host(weight: Tensor) -> Tensor:
    """Returns a copy of a weight in host memory; the copy is pinned if the weight is on a GPU."""
    return pinned_empty(weight.shape, weight.dtype, weight.device).copy_(weight)
