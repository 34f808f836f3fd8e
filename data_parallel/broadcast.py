"""Many tensors from one replica to the others, in messages neither tiny nor huge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from comm.communicator import Communicator


@torch.no_grad()
def broadcast_pieces(
    tensors: Sequence[Tensor], replicas: Communicator, *, root: int, limit: int
) -> None:
    """Fills `tensors`, of one type and contiguous, on every replica with those of replica `root`.

    They travel in messages of at most `limit` bytes; a larger tensor is one by itself, which needs
    no copy.
    """
    for piece in _cut(tensors, limit):
        if len(piece) == 1:
            replicas.broadcast(piece[0], root=root)
            continue
        flat = torch.cat([tensor.flatten() for tensor in piece])
        replicas.broadcast(flat, root=root)
        if replicas.rank != root:
            parts = torch.split(flat, [tensor.numel() for tensor in piece])
            for tensor, part in zip(piece, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def _cut(tensors: Sequence[Tensor], limit: int) -> Iterator[list[Tensor]]:
    piece: list[Tensor] = []
    for tensor in tensors:
        if piece and sum(one.nbytes for one in [*piece, tensor]) > limit:
            yield piece
            piece = []
        piece.append(tensor)
    if piece:
        yield piece


def same_on_all(tensors: Iterable[Tensor], replicas: Communicator) -> bool:
    """Whether every replica holds the same bits, by a checksum of each tensor."""
    sums = [t.contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors]
    gathered = replicas.all_gather(torch.stack(sums))
    return bool((gathered == gathered[0]).all())
