"""Channels over gloo: what arrives, in which order, and the very bits of a sum."""

from __future__ import annotations

import pytest
import torch

from comm.communicator import Communicator
from comm.host_copy import HostCopyCommunicator
from tests.comm.ranks import Rank, enter
from tests.dist import run_ranks

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.uint8,
    torch.bool,
)
LENGTHS = (0, 1, 3, 4, 1001, 40_003)


def values(member: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """What `member` holds, known to every process."""
    generator = torch.Generator().manual_seed(100 * length + member)
    if dtype.is_floating_point:
        return (torch.randn(length, generator=generator) * 10.0**member).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 50, (length,), generator=generator).to(
        dtype
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check_all_reduce(rank: Rank) -> None:
    for control in (rank.fabric.control, rank.fabric.pipeline):
        check_sums(control)


def check_sums(control: Communicator) -> None:
    for dtype in DTYPES:
        for length in LENGTHS:
            tensor = values(control.rank, length, dtype)
            expected = values(0, length, dtype)
            for member in range(1, control.size):
                expected = expected + values(member, length, dtype)
            control.all_reduce(tensor)
            assert bits(tensor) == bits(expected), (dtype, length)


def check_slices(rank: Rank) -> None:
    """A buffer of several slices gives the bits of the same elements in small pieces."""
    control = rank.fabric.control
    length = 5 * 2**20 + 5  # a slice of fp32 and a bit
    tensor = values(control.rank, length, torch.float32)
    ends = [tensor[:1000].clone(), tensor[-1000:].clone()]
    control.all_reduce(tensor)
    for part, whole in zip(ends, (tensor[:1000], tensor[-1000:]), strict=True):
        control.all_reduce(part)
        assert bits(part) == bits(whole)


def check_broadcast_and_gather(rank: Rank) -> None:
    control = rank.fabric.control
    for dtype in DTYPES:
        for root in range(control.size):
            tensor = values(control.rank, 7, dtype)
            control.broadcast(tensor, root=root)
            assert bits(tensor) == bits(values(root, 7, dtype)), (dtype, root)
        gathered = control.all_gather(values(control.rank, 6, dtype).view(2, 3))
        assert gathered.shape == (control.size, 2, 3)
        for member in range(control.size):
            assert bits(gathered[member]) == bits(values(member, 6, dtype)), (dtype, member)
    assert control.all_gather(torch.tensor(control.rank)).tolist() == list(range(control.size))


def check_order(rank: Rank) -> None:
    """Fifty messages of different lengths each way, all under way at once."""
    pipeline = rank.fabric.pipeline
    peer = 1 - pipeline.rank
    lengths = [1 + 37 * i % 4096 for i in range(50)]
    received = [torch.empty(length) for length in lengths]
    works = [pipeline.receive(tensor, source=peer) for tensor in received]
    works += [pipeline.send(torch.full((n,), float(i)), to=peer) for i, n in enumerate(lengths)]
    total = torch.ones(3)
    pipeline.all_reduce(total)  # does not meet the messages under way
    assert total.tolist() == [2.0, 2.0, 2.0]
    for work in reversed(works):
        work.wait()
    assert all((tensor == i).all() for i, tensor in enumerate(received))


def check_host_copies(rank: Rank) -> None:
    """The channel for device tensors over host memory, on tensors that are in host memory."""
    channel = HostCopyCommunicator(rank.fabric.pipeline)
    peer = 1 - channel.rank
    mine, theirs = torch.full((2, 3), float(channel.rank)), torch.empty(2, 3)
    works = [channel.receive(theirs, source=peer), channel.send(mine, to=peer)]
    mine.fill_(9.0)  # the copy travels
    for work in works:
        work.wait()
    assert (theirs == peer).all()
    channel.all_reduce(theirs)
    assert (theirs == 1.0).all()
    channel.broadcast(mine.fill_(peer), root=1)
    assert (mine == 0.0).all()
    assert channel.all_gather(torch.tensor([channel.rank])).tolist() == [[0], [1]]


def check_groups(rank: Rank) -> None:
    fabric, topology = rank.fabric, rank.topology
    mine = torch.tensor(topology.rank)
    assert (fabric.pipeline.rank, fabric.pipeline.size) == (topology.stage, 2)
    assert (fabric.replicas.rank, fabric.replicas.size) == (topology.replica, 2)
    assert tuple(fabric.pipeline.all_gather(mine)) == topology.pipeline_ranks(topology.replica)
    assert tuple(fabric.replicas.all_gather(mine)) == topology.replica_ranks(topology.stage)
    assert rank.rendezvous.ranks_on_this_host == (0, 1, 2, 3)
    assert {arrival.interface for arrival in rank.rendezvous.roster} == {"lo"}


def all_checks(rank: int, world_size: int, url: str) -> str:
    entered = enter(rank, url, num_stages=2, num_replicas=2)
    for check in (
        check_groups,
        check_all_reduce,
        check_slices,
        check_broadcast_and_gather,
        check_order,
        check_host_copies,
    ):
        check(entered)
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
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: Traceback.*the tale of rank one"):
        run_ranks(2, fails_on_one)
