"""Tests bucketed broadcasts: buckets are limited in size, and tensors arrive unchanged."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from comm.backends.single_process import SingleProcessCommunicator
from data_parallel.broadcast import broadcast_bucketed
from tests.support.gradients import gradients_of

SHAPES = [(3,), (2, 5), (40,), (1,), (6, 2), (7,)]
LIMIT = 4 * 20  # bytes of twenty numbers
BUCKETS = [13, 40, 20]  # numbers in each: 3 + 10; 40, beyond the limit; 1 + 12 + 7


class Wire(SingleProcessCommunicator):
    """A communicator that records the root's broadcasts and replays them for the other member."""

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


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("replicas", [1, 2])
def test_owners_of_sharded_weights_broadcast_them(replicas: int, sharded: bool) -> None:
    """If two replicas divide the weights, each broadcasts its share once; otherwise none does."""
    communicator = Wire(0, []) if replicas == 2 else SingleProcessCommunicator()
    with patch.object(communicator, "broadcast") as broadcast:
        gradients_of(nn.Linear(4, 5), communicator, sharded=sharded).after_update()
    roots = [call.kwargs["root"] for call in broadcast.call_args_list]
    assert roots == ([0, 1] if replicas == 2 and sharded else [])
