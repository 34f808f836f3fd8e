"""Tests the stage, the replica and the groups of each rank against tables written by hand."""

from comm.topology import Topology


def test_two_replicas_of_three_stages() -> None:
    table = [(t.stage, t.replica, t.is_first, t.is_last) for t in map(three_by_two, range(6))]
    one = [(0, True, False), (1, False, False), (2, False, True)]
    assert table == [(stage, r, *ends) for r in (0, 1) for stage, *ends in one]


def test_groups() -> None:
    topology = three_by_two(4)
    assert topology.world_size == 6
    assert [topology.pipeline_ranks(replica) for replica in range(2)] == [(0, 1, 2), (3, 4, 5)]
    assert [topology.replica_ranks(stage) for stage in range(3)] == [(0, 3), (1, 4), (2, 5)]
    assert topology.rank_of(stage=1, replica=1) == 4
    assert topology.describe(5) == "rank 5 (stage 2, replica 1)"


def test_one_process_is_every_stage() -> None:
    topology = Topology(rank=0, num_stages=1, num_replicas=1)
    assert (topology.is_first, topology.is_last) == (True, True)


def three_by_two(rank: int) -> Topology:
    return Topology(rank=rank, num_stages=3, num_replicas=2)
