"""The two neighbours of a stage: activations go to the next, gradients to the previous.

At a pipeline's ends there is no neighbour: the channel returns at once, so that nobody else asks
which stage this is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from comm.communicator import Communicator, Work


class PipelineChannel:
    """Messages of one shape and type between neighbouring stages.

    `shape` is (rows, tokens, hidden) of a microbatch's activations; gradients have the same.
    """

    def __init__(
        self,
        pipeline: Communicator,
        *,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._pipeline = pipeline
        self._prev = pipeline.rank - 1 if pipeline.rank > 0 else None
        self._next = pipeline.rank + 1 if pipeline.rank + 1 < pipeline.size else None
        self._shape, self._dtype, self._device = shape, dtype, device
        self._sends: list[Work] = []

    def receive_activation(self) -> Tensor | None:
        """What the previous stage sent next; None on the first stage."""
        return self._receive(self._prev)

    def receive_gradient(self) -> Tensor | None:
        """What the next stage sent next; None on the last stage."""
        return self._receive(self._next)

    def send_activation(self, activation: Tensor) -> None:
        """Starts sending to the next stage; nothing on the last."""
        self._send(activation, self._next)

    def send_gradient(self, gradient: Tensor | None) -> None:
        """Starts sending to the previous stage; nothing on the first."""
        self._send(gradient, self._prev)

    def flush(self) -> None:
        """Waits until everything sent has left."""
        for work in self._sends:
            work.wait()
        self._sends.clear()

    def _receive(self, source: int | None) -> Tensor | None:
        if source is None:
            return None
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._pipeline.receive(tensor, source=source).wait()
        return tensor

    def _send(self, tensor: Tensor | None, to: int | None) -> None:
        if to is None:
            return
        if tensor is None or tensor.shape != self._shape or tensor.dtype != self._dtype:
            found = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise RuntimeError(f"to send: {found}, but the channel has {self._shape} {self._dtype}")
        self._sends.append(self._pipeline.send(tensor.contiguous(), to=to))
