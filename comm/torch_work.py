"""What the channels over torch.distributed's groups share: bytes to send, and errors in words."""

from __future__ import annotations

import torch
from torch import Tensor

from comm.communicator import PeerLostError


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory, as bytes (nbytes,): they travel whatever the dtype is."""
    return tensor.detach().view(-1).view(torch.uint8)


def lost(what: str, error: RuntimeError, *, waited: float) -> PeerLostError:
    """torch's error in one line, with what was under way and for how many seconds."""
    reason = str(error).splitlines()[0].rpartition("] ")[2].rstrip(".")
    return PeerLostError(f"{what} failed after {waited:.1f} s (--dist-timeout): {reason}.")
