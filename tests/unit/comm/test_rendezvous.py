"""Joining: what cannot come together ends on every rank, in time, with one line that says why."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from comm.liveness.failure_policy import ExitPolicy
from comm.process_groups import create_process_groups
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import Interface
from comm.rendezvous.job_key import JobKey
from comm.rendezvous.join import Rendezvous, join
from comm.rendezvous.participants import Fact, Participant, find_mismatch
from comm.timing import DEFAULT_TIMING, Timing
from comm.topology import Topology
from tests.support.connected import enter
from tests.support.launcher import Process, free_port, start

LOOPBACK = Interface("lo", "127.0.0.1")
LITTLE_GRACE = Timing(join_grace=1.0)


def joins(
    ready: Path,
    rank: int,
    world_size: int,
    url: str,
    facts: dict[str, Fact],
    timeout: float,
    timing: Timing = DEFAULT_TIMING,
) -> Rendezvous:
    met = join(
        url=url,
        rank=rank,
        world_size=world_size,
        interface=LOOPBACK,
        facts=facts,
        key=JobKey("test"),
        start="",
        join_timeout=timeout,
        timing=timing,
    )
    ready.touch()
    return met


def arrives_and_dies(ready: Path, rank: int, world_size: int, url: str, timeout: float) -> None:
    """Killed between its arrival and the link: here, as soon as the ranks have met."""
    joins(ready, rank, world_size, url, {}, timeout)
    os._exit(9)


def links_and_hangs(ready: Path, rank: int, world_size: int, url: str, timeout: float) -> None:
    met = joins(ready, rank, world_size, url, {}, timeout)
    ExitPolicy.connect(met, Topology(rank, world_size, 1))
    os.kill(os.getpid(), signal.SIGSTOP)


def connects(_ready: Path, rank: int, url: str, timeout: float) -> None:
    enter(rank, url, num_stages=3, num_replicas=1, join_timeout=timeout)


def links_with_little_grace(
    ready: Path, rank: int, world_size: int, url: str, timeout: float
) -> None:
    links(ready, rank, world_size, url, timeout, LITTLE_GRACE)


def links(
    ready: Path,
    rank: int,
    world_size: int,
    url: str,
    timeout: float,
    timing: Timing = DEFAULT_TIMING,
) -> None:
    met = joins(ready, rank, world_size, url, {}, timeout, timing)
    ExitPolicy.connect(met, Topology(rank, world_size, 1))
    time.sleep(60.0)


@contextmanager
def running(*processes: Process) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def url_here() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def expect(process: Process, status: int, text: str, *, within: float) -> None:
    """The process ends with `status` and one line that holds `text` (waiting lines aside)."""
    assert process.status(within=within) == status, process.lines
    (line,) = [line for line in process.lines if "waiting for" not in line]
    assert text in line


def test_a_missing_rank_is_named_everywhere(tmp_path: Path) -> None:
    url = url_here()
    ranks = [start(tmp_path, str(r), joins, r, 4, url, {}, 3.0) for r in (0, 1)]
    with running(*ranks):
        for rank in ranks:
            expect(rank, 1, "rank 2, rank 3 did not join at tcp://127.0.0.1:", within=10.0)


def joins_telling_often(ready: Path, rank: int, url: str) -> None:
    joins(ready, rank, 3, url, {}, 4.0, Timing(report=0.5))


def test_waiting_is_told(tmp_path: Path) -> None:
    url, astray = url_here(), url_here()
    ranks = [start(tmp_path, str(r), joins_telling_often, r, url) for r in (0, 1)]
    ranks.append(start(tmp_path, "2", joins_telling_often, 2, astray))
    with running(*ranks):
        expect(ranks[0], 1, "rank 2 did not join", within=15.0)
        expect(ranks[1], 1, "rank 2 did not join", within=15.0)
        expect(ranks[2], 2, f"--dist-url {astray}: no answer within 4 s", within=15.0)
    for rank, told in zip(
        ranks,
        (
            "waiting for rank 2 (2 s of 4 s)",
            f"joined the master at {url} over lo; waiting for rank 2 (2 s of 4 s)",
            f"waiting for the master at {astray} over lo (2 s of 4 s)",
        ),
        strict=True,
    ):
        assert told in rank.lines


def test_differing_facts_end_all_with_the_same_line(tmp_path: Path) -> None:
    url = url_here()
    facts: list[dict[str, Fact]] = [{"--fp16": False}, {"--fp16": False}, {"--fp16": True}]
    ranks = [start(tmp_path, str(r), joins, r, 3, url, facts[r], 20.0) for r in range(3)]
    host = socket.gethostname()
    with running(*ranks):
        for rank in ranks:
            expect(
                rank,
                2,
                f"--fp16 must be the same on all ranks: it is false on rank 0 (host {host}) and "
                f"true on rank 2 (host {host})",
                within=10.0,
            )


def test_a_differing_world_size_ends_all(tmp_path: Path) -> None:
    url = url_here()
    ranks = [start(tmp_path, str(r), joins, r, 2 + 2 * r, url, {}, 20.0) for r in range(2)]
    with running(*ranks):
        for rank in ranks:
            expect(rank, 2, "--world-size must be the same on all ranks: it is 2", within=10.0)


def test_two_processes_of_one_rank(tmp_path: Path) -> None:
    url = url_here()
    ranks = [start(tmp_path, n, joins, int(n[0]), 3, url, {}, 20.0) for n in ("0", "1", "1 again")]
    with running(*ranks):
        for rank in ranks:
            expect(rank, 2, "--rank 1: two processes have it, on host ", within=10.0)


def test_a_busy_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        rank = start(tmp_path, "0", joins, 0, 2, f"tcp://127.0.0.1:{port}", {}, 20.0)
        with running(rank):
            expect(rank, 2, f"127.0.0.1:{port}: port {port} is in use on this machine", within=5.0)


def joins_with_little_grace(
    ready: Path, rank: int, world_size: int, url: str, timeout: float
) -> None:
    joins(ready, rank, world_size, url, {}, timeout, LITTLE_GRACE)


def test_a_foreign_listener_that_never_answers(tmp_path: Path) -> None:
    """torch's client would wait forever; the deadline does not."""
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        url = f"tcp://127.0.0.1:{foreign.getsockname()[1]}"
        rank = start(tmp_path, "1", joins_with_little_grace, 1, 2, url, 1.0)
        with running(rank):
            expect(rank, 2, f"--dist-url {url}: something accepts connections", within=12.0)


def test_a_master_elsewhere(tmp_path: Path) -> None:
    rank = start(tmp_path, "0", joins, 0, 2, "tcp://192.0.2.1:7033", {}, 20.0)
    with running(rank):
        expect(rank, 2, "no interface of this machine holds 192.0.2.1", within=5.0)


def test_a_rank_that_dies_before_the_groups_stand(tmp_path: Path) -> None:
    url = url_here()
    ranks = [start(tmp_path, str(r), links, r, 3, url, 4.0) for r in (0, 1)]
    dying = start(tmp_path, "2", arrives_and_dies, 2, 3, url, 4.0)
    with running(*ranks, dying):
        for rank in ranks:
            expect(rank, 1, "rank 2 (stage 2, replica 0, host ", within=10.0)


def test_a_rank_that_lingers_past_the_deadline_reports_one_line(tmp_path: Path) -> None:
    """As where the wire to other machines is cut while the ranks link."""
    url = url_here()
    hanging = start(tmp_path, "1", links_and_hangs, 1, 3, url, 3.0)
    dying = start(tmp_path, "2", arrives_and_dies, 2, 3, url, 3.0)
    rank = start(tmp_path, "0", links_with_little_grace, 0, 3, url, 3.0)
    with running(rank, hanging, dying):
        expect(rank, 1, "rank 2 (stage 2, replica 0, host ", within=20.0)


def test_a_rank_that_hangs_before_the_groups_stand(tmp_path: Path) -> None:
    """The others name it, and not whom their own deadline ended first."""
    url = url_here()
    ranks = [start(tmp_path, str(r), connects, r, url, 2.0) for r in (0, 1)]
    hanging = start(tmp_path, "2", links_and_hangs, 2, 3, url, 2.0)
    with running(*ranks, hanging):
        for rank in ranks:
            expect(rank, 1, "rank 2 (stage 2, replica 0, host ", within=20.0)
            assert "is gone: it does not answer" in rank.lines[-1]


def test_a_world_of_one_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    topology = Topology(0, 1, 1)
    met = Rendezvous.alone()
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
    """Hosts files often give a machine's own name a loopback address."""
    participants = [
        Participant(0, "a", "127.0.1.1", "lo", 1, {}),
        Participant(1, "b", "10.0.0.2", "eth0", 1, {}),
    ]
    problem = find_mismatch(participants)
    assert problem is not None
    assert problem.startswith("--net-interface: rank 0 (host a) uses lo (127.0.1.1), which rank 1")
