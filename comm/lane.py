"""A side stream for messages: CUDA's where there is one, a no-op for tensors in host memory."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in a lane."""

    def reached(self) -> bool:
        """Whether all before it is done; does not wait."""

    def hold_compute(self) -> None:
        """Lets nothing queued from now on run before it; the host goes on."""


class Lane(Protocol):
    """Messages of one lane run in their order, beside the computation."""

    @property
    def pointer(self) -> int:
        """The stream for a C library."""

    def enter(self, tensor: Tensor) -> None:
        """What is queued next sees `tensor` as the computation queued so far leaves it."""

    def mark(self) -> Mark:
        """The point after all that is queued."""


def lane_on(device: torch.device) -> Lane:
    """A new lane on `device`."""
    return CudaLane(device) if device.type == "cuda" else HostLane()


class CudaLane:
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def pointer(self) -> int:
        return int(self._stream.cuda_stream)

    def enter(self, tensor: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        tensor.record_stream(self._stream)  # its memory is not reused while a message needs it

    def mark(self) -> Mark:
        return _CudaMark(self._stream.record_event(), self._device)


class _CudaMark:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def reached(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def hold_compute(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)


class HostLane:
    """Host memory: a call is done when it returns."""

    @property
    def pointer(self) -> int:
        return 0

    def enter(self, tensor: Tensor) -> None:
        """Nothing is queued."""

    def mark(self) -> Mark:
        return _HostMark()


class _HostMark:
    def reached(self) -> bool:
        return True

    def hold_compute(self) -> None:
        """Nothing is queued."""
