"""Pinned buffers for messages; buffers of complete messages are used again.

torch's own cache is no substitute: with `pinned_max_cached_size_mb` in PYTORCH_ALLOC_CONF it keeps
no large buffer, and each allocation and each release of a pinned buffer then blocks the host and
the GPU.
"""

import torch
from torch import Tensor

from common.tensors import pinned_empty


class PinnedBuffer:
    """A buffer of a PinnedPool; `read` is the point after the last copy that reads the buffer."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._bytes = pinned_empty((num_bytes,), torch.uint8, device)
        self.num_bytes = num_bytes
        self.read: torch.cuda.Event | None = None

    @property
    def is_free(self) -> bool:
        """Returns whether no copy to the device reads the buffer any more; does not wait."""
        return self.read is None or bool(self.read.query())

    def view_like(self, tensor: Tensor) -> Tensor:
        """Returns the start of the buffer as a tensor with the shape and type of `tensor`."""
        return self._bytes[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


class PinnedPool:
    """The pinned buffers of a communicator; it allocates one only if no free buffer is big enough.

    After some iterations all sizes have occurred, and the pool allocates no more buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[PinnedBuffer] = []

    def take(self, tensor: Tensor) -> PinnedBuffer:
        """Returns a buffer for the bytes of `tensor`: the smallest free buffer that is big enough.

        Raises:
            HostMemoryError: the host has too little memory for another buffer.
        """
        fitting = [b for b in self._buffers if b.num_bytes >= tensor.nbytes and b.is_free]
        if not fitting:
            return PinnedBuffer(tensor.nbytes, self._device)
        best = min(fitting, key=lambda buffer: buffer.num_bytes)
        self._buffers.remove(best)
        return best

    def give_back(self, buffer: PinnedBuffer, *, read: torch.cuda.Event | None = None) -> None:
        """Puts `buffer` into the pool; it is free after the point `read`."""
        buffer.read = read
        self._buffers.append(buffer)
