"""Tests which replicas update each weight."""

import torch
from torch import nn

from data_parallel.zero_partition import ZeroPartition, assign_owners
from tests.support.pipeline_doubles import NotedCommunicator

PARAMETERS = {name: nn.Parameter(torch.zeros(size)) for name, size in (("a", 3), ("b", 5))}


def test_owners_share_evenly() -> None:
    assert assign_owners([5, 100, 50, 50, 5], 2) == [0, 0, 1, 1, 1]
    assert assign_owners([1, 2, 3], 1) == [0, 0, 0]
    assert assign_owners([4], 3) == [0]


def test_without_sharding_all_replicas_hold_all_weights_and_the_first_reports_them() -> None:
    partition = ZeroPartition(PARAMETERS, NotedCommunicator(1, 2), sharded=False)
    assert partition.owned == ["a", "b"]
    assert partition.holders("a") == [0, 1]
    assert partition.owner("a") == 0


def test_a_sharded_weight_has_one_holder() -> None:
    partition = ZeroPartition(PARAMETERS, NotedCommunicator(1, 2), sharded=True)
    assert partition.owned == ["a"]
    assert [partition.holders(name) for name in "ab"] == [[1], [0]]
    assert [partition.owner(name) for name in "ab"] == [1, 0]
