"""Broadcasts in pieces: bounded, and what arrives is what was sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from comm.backends.single_process import SingleProcessCommunicator
from data_parallel.broadcast import broadcast_pieces
from optimizer.adam import Adam
from optimizer.mixed_precision import MixedPrecisionOptimizer

SHAPES = [(3,), (2, 5), (40,), (1,), (6, 2), (7,)]
LIMIT = 4 * 20  # bytes: of twenty numbers
PIECES = [13, 40, 20]  # numbers in each: 3 + 10, one larger than the limit, 1 + 12 + 7


class Wire(SingleProcessCommunicator):
    """Keeps what the root broadcasts, and gives it to a member that is not the root."""

    def __init__(self, rank: int, sent: list[Tensor]) -> None:
        self._rank, self._sent, self._next = rank, sent, 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return 2

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        if root == self._rank:
            self._sent.append(tensor.clone())
        else:
            tensor.copy_(self._sent[self._next])
            self._next += 1


def test_pieces_are_bounded_and_whole() -> None:
    sent: list[Tensor] = []
    ours = [torch.randn(shape) for shape in SHAPES]
    theirs = [torch.zeros(shape) for shape in SHAPES]
    kept = [tensor.clone() for tensor in ours]
    broadcast_pieces(ours, Wire(0, sent), root=0, limit=LIMIT)
    broadcast_pieces(theirs, Wire(1, sent), root=0, limit=LIMIT)
    assert [piece.numel() for piece in sent] == PIECES
    assert all(map(torch.equal, theirs, kept))
    assert all(map(torch.equal, ours, kept))


@pytest.mark.parametrize("replicas", [1, 2])
def test_one_replica_has_nothing_to_share(replicas: int) -> None:
    sent: list[Tensor] = []
    communicator = Wire(0, sent) if replicas == 2 else SingleProcessCommunicator()
    calls: list[int] = []
    broadcast = communicator.broadcast

    def counted(tensor: Tensor, *, root: int) -> None:
        calls.append(root)
        if root == 0:
            broadcast(tensor, root=root)

    communicator.broadcast = counted  # type: ignore[method-assign]
    optimizer = MixedPrecisionOptimizer(
        {"a": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.ones(5))},
        Adam(),
        dtype=torch.float32,
        weight_decay=0.0,
        offload=False,
        sharded=True,
        replicas=communicator,
    )
    optimizer.share_weights()
    assert calls == ([] if replicas == 1 else [0, 1])
