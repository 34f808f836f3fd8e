"""Bucketed broadcasts: messages are bounded, and what arrives is what was sent."""

import pytest
import torch
from torch import Tensor, nn

from comm.backends.single_process import SingleProcessCommunicator
from data_parallel.broadcast import broadcast_bucketed
from tests.support.gradients import gradients_of

SHAPES = [(3,), (2, 5), (40,), (1,), (6, 2), (7,)]
LIMIT = 4 * 20  # bytes: of twenty numbers
BUCKETS = [13, 40, 20]  # numbers in each: 3 + 10, one larger than the limit, 1 + 12 + 7


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


def test_buckets_are_bounded_and_whole() -> None:
    sent: list[Tensor] = []
    ours = [torch.randn(shape) for shape in SHAPES]
    theirs = [torch.zeros(shape) for shape in SHAPES]
    kept = [tensor.clone() for tensor in ours]
    broadcast_bucketed(ours, Wire(0, sent), root=0, bucket_bytes=LIMIT)
    broadcast_bucketed(theirs, Wire(1, sent), root=0, bucket_bytes=LIMIT)
    assert [bucket.numel() for bucket in sent] == BUCKETS
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
    model = nn.Linear(4, 5)
    gradients = gradients_of(model, communicator, sharded=True)
    gradients.after_update()
    assert calls == ([] if replicas == 1 else [0, 1])
