"""Tests that every rank ends before a deadline, with a one-line error, if the rendezvous fails."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from comm.liveness.failure_policy import ExitPolicy
from comm.process_groups import create_process_groups
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.join import Rendezvous
from comm.rendezvous.participants import Participant, find_mismatch
from comm.timing import Timing
from comm.topology import Topology
from tests.support.connected import enter, meet
from tests.support.launcher import Launch, Process, free_port

Programs = tuple[Callable[..., object], ...]
LITTLE_GRACE = Timing(join_grace=1.0)


def joins(ready: Path, rank: int, world_size: int, url: str, **options: Any) -> Rendezvous:
    met = meet(rank, world_size, url, **options)
    ready.touch()
    return met


def arrives_and_dies(ready: Path, rank: int, world_size: int, url: str, **options: Any) -> None:
    """Joins the rendezvous; then the process dies before connecting to the liveness server."""
    joins(ready, rank, world_size, url, **options)
    os._exit(9)


def links(ready: Path, rank: int, world_size: int, url: str, **options: Any) -> None:
    met = joins(ready, rank, world_size, url, **options)
    ExitPolicy.connect(met, Topology(rank, world_size, 1))
    time.sleep(60.0)


def links_and_hangs(ready: Path, rank: int, world_size: int, url: str, **options: Any) -> None:
    met = joins(ready, rank, world_size, url, **options)
    ExitPolicy.connect(met, Topology(rank, world_size, 1))
    os.kill(os.getpid(), signal.SIGSTOP)


def connects(_ready: Path, rank: int, world_size: int, url: str, **options: Any) -> None:
    enter(rank, url, num_stages=world_size, num_replicas=1, **options)


@pytest.fixture
def url() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def expect(processes: Iterable[Process], status: int, text: str, *, within: float) -> None:
    """Checks that each process exits with `status` after printing one line, which contains `text`.

    Lines with "waiting for" do not count.
    """
    for process in processes:
        assert process.status(within=within) == status, process.lines
        (line,) = [line for line in process.lines if "waiting for" not in line]
        assert text in line


def test_a_missing_rank_is_named_everywhere(launch: Launch, url: str) -> None:
    ranks = [launch(joins, r, 4, url, join_timeout=3.0) for r in (0, 1)]
    expect(ranks, 1, "rank 2, rank 3 did not join at tcp://127.0.0.1:", within=10.0)


def test_waiting_is_told(launch: Launch, url: str) -> None:
    astray = f"tcp://127.0.0.1:{free_port()}"
    often: dict[str, Any] = {"join_timeout": 4.0, "timing": Timing(report=0.5)}
    ranks = [launch(joins, r, 3, where, **often) for r, where in enumerate((url, url, astray))]
    expect(ranks[:2], 1, "rank 2 did not join", within=15.0)
    expect(ranks[2:], 2, f"--dist-url {astray}: no answer within 4 s", within=15.0)
    assert "waiting for rank 2 (2 s of 4 s)" in ranks[0].lines
    joined = f"joined the master at {url} over lo; waiting for rank 2 (2 s of 4 s)"
    assert joined in ranks[1].lines
    assert f"waiting for the master at {astray} over lo (2 s of 4 s)" in ranks[2].lines


def test_differing_facts_end_all_with_the_same_line(launch: Launch, url: str) -> None:
    ranks = [launch(joins, r, 3, url, facts={"--fp16": r == 2}) for r in range(3)]
    host = socket.gethostname()
    ends = f"it is false on rank 0 (host {host}) and true on rank 2 (host {host})"
    expect(ranks, 2, f"--fp16 must be the same on all ranks: {ends}", within=10.0)


def test_a_differing_world_size_ends_all(launch: Launch, url: str) -> None:
    ranks = [launch(joins, r, 2 + 2 * r, url) for r in range(2)]
    expect(ranks, 2, "--world-size must be the same on all ranks: it is 2", within=10.0)


def test_two_processes_of_one_rank(launch: Launch, url: str) -> None:
    ranks = [launch(joins, r, 3, url) for r in (0, 1, 1)]
    expect(ranks, 2, "--rank 1: two processes have it, on host ", within=10.0)


def test_a_busy_port(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        rank = launch(joins, 0, 2, f"tcp://127.0.0.1:{port}")
        expect([rank], 2, f"127.0.0.1:{port}: port {port} is in use on this machine", within=5.0)


def test_a_foreign_listener_that_never_answers(launch: Launch) -> None:
    """If a foreign server never answers, a rank ends at the deadline; torch's client would hang."""
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        url = f"tcp://127.0.0.1:{foreign.getsockname()[1]}"
        rank = launch(joins, 1, 2, url, join_timeout=1.0, timing=LITTLE_GRACE)
        expect([rank], 2, f"--dist-url {url}: something accepts connections", within=12.0)


def test_a_master_elsewhere(launch: Launch) -> None:
    rank = launch(joins, 0, 2, "tcp://192.0.2.1:7033")
    expect([rank], 2, "no interface of this machine holds 192.0.2.1", within=5.0)


def test_a_rank_that_dies_before_the_groups_stand(launch: Launch, url: str) -> None:
    programs: Programs = (links, links, arrives_and_dies)
    ranks = [launch(program, r, 3, url, join_timeout=4.0) for r, program in enumerate(programs)]
    expect(ranks[:2], 1, "rank 2 (stage 2, replica 0, host ", within=10.0)


def test_a_rank_that_lingers_past_the_deadline_reports_one_line(launch: Launch, url: str) -> None:
    """A rank that is alone after the deadline, because its peers hang or died, reports one line."""
    launch(links_and_hangs, 1, 3, url, join_timeout=3.0)
    launch(arrives_and_dies, 2, 3, url, join_timeout=3.0)
    rank = launch(links, 0, 3, url, join_timeout=3.0, timing=LITTLE_GRACE)
    expect([rank], 1, "rank 2 (stage 2, replica 0, host ", within=20.0)


def test_a_rank_that_hangs_before_the_groups_stand(launch: Launch, url: str) -> None:
    """At the deadline, both other ranks name the hung rank, even if one of them ends first."""
    programs: Programs = (connects, connects, links_and_hangs)
    ranks = [launch(program, r, 3, url, join_timeout=2.0) for r, program in enumerate(programs)]
    expect(ranks[:2], 1, "rank 2 (stage 2, replica 0, host ", within=20.0)
    assert all("is gone: it does not answer" in rank.lines[-1] for rank in ranks[:2])


def test_a_world_of_one_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    topology, met = Topology(0, 1, 1), Rendezvous.alone()
    policy = ExitPolicy.connect(met, topology)
    groups = create_process_groups(
        topology,
        met,
        dist_backend="gloo",
        dp_backend="gloo",
        device=torch.device("cpu"),
        dist_timeout=1.0,
        policy=policy,
    )
    tensor = torch.ones(2)
    groups.replicas.all_reduce(tensor).wait()
    groups.control.broadcast(tensor, root=0)
    assert groups.control.all_gather(tensor).tolist() == [[1.0, 1.0]]
    with pytest.raises(AssertionError, match="no member 1"):
        groups.pipeline.send(tensor, to=1)
    groups.close()
    policy.detector.close()
    assert not torch.distributed.is_initialized()
    assert met.ranks_on_this_host == (0,)


@pytest.mark.parametrize(
    "url", ["tcp://here", "http://here:80", "here:80", "tcp://a:b", "tcp://:1"]
)
def test_a_malformed_url(url: str) -> None:
    with pytest.raises(ValueError, match=f"--dist-url {url}: .*expected tcp://host:port"):
        parse_dist_url(url)


def test_ipv6_url() -> None:
    assert parse_dist_url("tcp://[::1]:7033") == ("::1", 7033)


def test_a_loopback_address_among_others_is_a_mistake() -> None:
    """A loopback address is an error if the address of another rank is not a loopback address."""
    there = Participant(1, "b", "10.0.0.2", "eth0", 1, {})
    problem = find_mismatch([Participant(0, "a", "127.0.1.1", "lo", 1, {}), there])
    assert problem is not None
    assert problem.startswith("--net-interface: rank 0 (host a) uses lo (127.0.1.1), which rank 1")
