"""Tests communicators over gloo: content and order of messages, and the exact bits of sums."""

import pytest
import torch

from comm.backends.host_staging import HostStagingCommunicator
from tests.support.backend_checks import DTYPES, bits, check_group, values
from tests.support.connected import Rank, enter
from tests.support.cuda_double import DEVICE, Finished, cuda_double
from tests.support.launcher import run_ranks


def check_slices(rank: Rank) -> None:
    """Checks that an all-reduce of a long tensor has the same bits as all-reduces of its parts."""
    control = rank.groups.control
    length = 5 * 2**20 + 5  # one slice of fp32 and 5 numbers more
    tensor = values(control.rank, length, torch.float32)
    ends = [tensor[:1000].clone(), tensor[-1000:].clone()]
    control.all_reduce(tensor).wait()
    for part, whole in zip(ends, (tensor[:1000], tensor[-1000:]), strict=True):
        control.all_reduce(part).wait()
        assert bits(part) == bits(whole)


def check_host_copies(rank: Rank) -> None:
    """Checks, with CPU tensors, that HostStagingCommunicator sends copies of tensors."""
    channel = HostStagingCommunicator(rank.groups.pipeline, torch.device("cpu"))
    peer = 1 - channel.rank
    mine, theirs = torch.full((2, 3), float(channel.rank)), torch.empty(2, 3)
    works = [channel.receive(theirs, source=peer), channel.send(mine, to=peer)]
    mine.fill_(9.0)  # the copy is sent
    for work in works:
        work.wait()
    assert (theirs == peer).all()
    work = channel.all_reduce(theirs)
    assert (theirs == peer).all(), "the copy is sent"
    work.wait()
    assert (theirs == 1.0).all()
    channel.reduce(theirs, root=1).wait()
    assert (theirs == 1.0 + channel.rank).all()
    channel.broadcast(mine.fill_(peer), root=1)
    assert (mine == 0.0).all()
    assert channel.all_gather(torch.tensor([channel.rank])).tolist() == [[0], [1]]


def check_staging(rank: Rank) -> None:
    """Runs all checks of a group of four over pinned copies, with a double of CUDA's streams.

    The worker thread starts sums while this thread waits for earlier sums.
    """
    with cuda_double(copy_seconds=0.0002) as cuda:
        staging = HostStagingCommunicator(rank.groups.control, DEVICE)
        check_group(Finished(staging, cuda), sums=(torch.float32, torch.bfloat16))
        staging._worker.close()  # the group of the host is used again


def check_groups(rank: Rank) -> None:
    groups, topology = rank.groups, rank.topology
    mine = torch.tensor(topology.rank)
    assert (groups.pipeline.rank, groups.pipeline.size) == (topology.stage, 2)
    assert (groups.replicas.rank, groups.replicas.size) == (topology.replica, 2)
    assert tuple(groups.pipeline.all_gather(mine)) == topology.pipeline_ranks(topology.replica)
    assert tuple(groups.replicas.all_gather(mine)) == topology.replica_ranks(topology.stage)
    assert rank.rendezvous.ranks_on_this_host == (0, 1, 2, 3)
    assert {participant.interface for participant in rank.rendezvous.participants} == {"lo"}


def all_checks(rank: int, world_size: int, url: str) -> str:
    entered = enter(rank, url, num_stages=2, num_replicas=2)
    for check in (check_groups, check_slices, check_host_copies, check_staging):
        check(entered)
    for group in (entered.groups.control, entered.groups.pipeline):
        check_group(group, sums=DTYPES)
    entered.close()
    return entered.rendezvous.nonce


def test_four_ranks() -> None:
    nonces = run_ranks(4, all_checks)
    assert len(set(nonces)) == 1
    assert len(nonces[0]) == 32


def fails_on_one(rank: int, world_size: int, url: str) -> None:
    if rank == 1:
        raise LookupError("the tale of rank one")


def test_a_failed_rank_brings_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*Traceback.*the tale of rank one"):
        run_ranks(2, fails_on_one)
