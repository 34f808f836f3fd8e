"""Tests torch's own NCCL backend on CPU, with gloo groups in place of NCCL groups."""

import os
import queue
import threading
import weakref
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist

from comm.backends.base import Group, GroupMembership, TorchWork
from comm.backends.torch_nccl import (
    TorchGroups,
    TorchNcclCommunicator,
    connect_neighbours,
    new_group,
)
from comm.communicator import CurrentOperation, PeerLostError, Work
from comm.topology import Topology
from tests.support.backend_checks import NUMBERS, check_collectives, check_group, check_pipeline
from tests.support.connected import enter
from tests.support.launcher import free_port, run_ranks
from tests.support.torch_nccl_double import gloo_for_nccl

EXACT = (torch.int64, torch.uint8)  # their sums do not depend on gloo's order
MESSAGE = "pipeline receive from rank 1 (stage 1, replica 0)"


def all_checks(
    rank: int, world_size: int, _url: str, shapes: list[tuple[int, int, bool, str]]
) -> list[list[tuple[int, ...]]]:
    groups = []
    for stages, replicas, measures_links, url in shapes:
        with (
            gloo_for_nccl() as made,
            patch("comm.backends.torch_nccl.dist.isend", wraps=dist.isend) as sends,
            patch("comm.backends.torch_nccl.dist.irecv", wraps=dist.irecv) as receives,
        ):
            entered = enter(
                rank,
                url,
                num_stages=stages,
                num_replicas=replicas,
                dist_backend="nccl",
                measures_links=measures_links,
            )
        pipeline, members = entered.groups.pipeline, entered.groups.replicas
        neighbours = (pipeline.rank > 0) + (pipeline.rank + 1 < pipeline.size)
        edges = neighbours + measures_links * (members.size - 1)
        assert sends.call_count == receives.call_count == edges, "one message per edge"
        if pipeline.size > 1:
            assert isinstance(pipeline, TorchNcclCommunicator)
            check_pipeline(pipeline)
        if members.size > 1:
            assert isinstance(members, TorchNcclCommunicator)
            check = check_group if measures_links else check_collectives
            check(members, sums=NUMBERS if members.size == 2 else EXACT)
        entered.close()
        groups.append(made)
    return groups


def test_four_ranks() -> None:
    """All ranks make the same groups, and none that training does not use.

    A pipeline has two groups (one per direction) for each pair of neighbours. The replicas of a
    stage have one group. Both kinds of groups had both kinds before, and so twice the streams.
    --check-cluster also needs a group per direction for each pair of replicas.
    """
    cases = ((2, 2, True), (4, 1, False), (1, 4, False))
    shapes = [(*case, f"tcp://127.0.0.1:{free_port()}") for case in cases]
    groups = run_ranks(4, all_checks, shapes, deadline=120.0)
    assert all(of_rank == groups[0] for of_rank in groups)
    made = [" ".join("".join(map(str, ranks)) for ranks in of_shape) for of_shape in groups[0]]
    assert made == ["01 10 23 32 02 20 02 13 31 13", "01 10 12 21 23 32", "0123"]


def test_a_message_without_a_group_of_its_own_is_refused() -> None:
    """Over the group of all members, --check-cluster hung for --dist-timeout.

    torch gives both directions between two members of a group one stream. The probe of a link posts
    a receive and then sends the message on which the receive depends.
    """
    group = Group("replicas", (0, 1), Topology(0, 1, 2), CurrentOperation(), 1.0)
    channel = TorchNcclCommunicator.__new__(TorchNcclCommunicator)
    GroupMembership.__init__(channel, group)
    channel._groups = TorchGroups(None, {(1, 0): Mock()})
    with pytest.raises(AssertionError, match="replicas: no group for messages from 0 to 1"):
        channel.send(torch.zeros(1), to=1)


def lose_a_peer(rank: int, world_size: int, url: str) -> None:
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    told: queue.SimpleQueue[PeerLostError] = queue.SimpleQueue()
    with gloo_for_nccl():
        channel = TorchNcclCommunicator(
            connect_neighbours((0, 1), dist_timeout=1.0),
            Group("pipeline", (0, 1), Topology(rank, 2, 1), CurrentOperation(), dist_timeout=1.0),
            device=torch.device("cpu"),
            on_hang=told.put,
        )
    if rank == 1:
        channel.receive(torch.zeros(1), source=0).wait()
        os._exit(0)
    work = channel.receive(torch.zeros(1), source=1)
    failed: Future[None] = Future()
    threading.Thread(target=_wait, args=(work, failed), daemon=True).start()
    assert str(told.get(timeout=20.0)).startswith(f"{MESSAGE} took more than 1 s (--dist-timeout)")
    channel.send(torch.zeros(1), to=1).wait()
    failed.result(timeout=20.0)


def _wait(work: Work, outcome: Future[None]) -> None:
    try:
        work.wait()
    except PeerLostError as error:
        outcome.set_exception(error)


def test_a_peer_that_hangs_and_then_dies_is_named() -> None:
    """Rank 0 reports that rank 1 hangs; when rank 1 dies, rank 0's error names rank 1."""
    with pytest.raises(RuntimeError) as caught:
        run_ranks(2, lose_a_peer)
    assert f"PeerLostError: {MESSAGE} failed after" in str(caught.value)


def test_messages_have_a_stream_of_high_priority() -> None:
    """Streams of one priority share hardware queues, where a waiting receive blocks computation."""
    timeout = timedelta(seconds=7)
    with (
        patch("torch.distributed.ProcessGroupNCCL", create=True) as nccl,
        patch("torch.distributed.new_group") as make,
    ):
        new_group((0, 2), timeout)
    nccl.Options.assert_called_once_with(is_high_priority_stream=True)
    options = nccl.Options.return_value
    assert options._timeout == timeout
    make.assert_called_once_with([0, 2], backend="nccl", timeout=timeout, pg_options=options)


def test_a_work_of_torch_releases_its_tensors_at_the_wait() -> None:
    """A caller that kept the Work kept the memory of the message, which torch's object holds."""

    class WorkOfTorch:
        def __init__(self, tensor: torch.Tensor) -> None:
            self._tensor = tensor

        def wait(self, timeout: timedelta) -> None:
            """Returns at once."""

    tensor = torch.ones(3)
    alive = weakref.ref(tensor)
    work = TorchWork("send", partial(WorkOfTorch, tensor), CurrentOperation())  # type: ignore[arg-type]
    del tensor
    assert alive() is not None
    work.wait()
    assert alive() is None
