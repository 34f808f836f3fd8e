"""Copies between a device and host memory that run during the computation."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StreamCopy:
    """A copy that a CopyStream has started; it keeps both tensors alive.

    `event` is the point after the copy in its stream; it is None if the copy is complete.
    """

    target: Tensor
    source: Tensor
    event: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Blocks this thread until the copy is complete."""
        if self.event is not None:
            self.event.synchronize()

    def block_compute(self) -> None:
        """Delays computation that is queued after this call until the copy is complete."""
        if self.event is not None:
            torch.cuda.current_stream(self.target.device).wait_event(self.event)


class CopyStream:
    """A CUDA stream for copies in one direction: a GPU copies in both directions at the same time.

    Each copy names the computation that it waits for, so it runs beside later computation. On a CPU
    there is no stream, and a copy is complete when `start` returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def record_compute(self) -> torch.cuda.Event | None:
        """Returns the point after all computation that is queued so far; None on a CPU."""
        if self._stream is None:
            return None
        now: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return now

    @torch.no_grad()
    def start(
        self, target: Tensor, source: Tensor, *, after: torch.cuda.Event | None
    ) -> StreamCopy:
        """Starts to copy `source` to `target` after the computation before the point `after`.

        On a GPU the tensor in host memory must be pinned; otherwise the copy blocks this thread.
        """
        if self._stream is None or after is None:
            return StreamCopy(target.copy_(source), source)
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # a thread that waits for it sleeps
        self._stream.record_event(event)
        return StreamCopy(target, source, event)
