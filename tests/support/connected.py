"""Ranks for tests; they join a run and connect process groups as the entry script does."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comm.communicator import PeerLostError
from comm.liveness.failure_policy import ExitPolicy
from comm.process_groups import ProcessGroups, create_process_groups
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import Interface, choose_interface, export
from comm.rendezvous.job_key import JobKey
from comm.rendezvous.join import Rendezvous, join
from comm.rendezvous.participants import Fact
from comm.timing import DEFAULT_TIMING, Timing
from comm.topology import Topology


@dataclass(frozen=True)
class Rank:
    """One process that has joined a run and connected its process groups."""

    topology: Topology
    rendezvous: Rendezvous
    policy: ExitPolicy
    groups: ProcessGroups

    def close(self) -> None:
        self.groups.close()
        self.policy.detector.close()


RankProgram = Callable[[Rank], None]
LOOPBACK = Interface("lo", "127.0.0.1")
CPU = torch.device("cpu")


def meet(
    rank: int,
    world_size: int,
    url: str,
    *,
    facts: dict[str, Fact] | None = None,
    key: JobKey | None = None,
    interface: Interface = LOOPBACK,
    join_timeout: float = 20.0,
    timing: Timing = DEFAULT_TIMING,
) -> Rendezvous:
    """Joins a run without connecting process groups."""
    return join(
        url=url,
        rank=rank,
        world_size=world_size,
        interface=interface,
        facts=facts or {},
        key=key or JobKey("test"),
        start="",
        join_timeout=join_timeout,
        timing=timing,
    )


def enter(
    rank: int,
    url: str,
    *,
    num_stages: int,
    num_replicas: int,
    join_timeout: float = 30.0,
    dist_timeout: float = 30.0,
    facts: dict[str, Fact] | None = None,
    dist_backend: str = "gloo",
    device: torch.device = CPU,
    timing: Timing = DEFAULT_TIMING,
    measures_links: bool = False,
) -> Rank:
    """Joins a run and connects all process groups; a world of one has no rendezvous."""
    topology = Topology(rank=rank, num_stages=num_stages, num_replicas=num_replicas)
    interface = choose_interface(flag=None, master_host=parse_dist_url(url)[0], environ=os.environ)
    export(interface, os.environ)
    rendezvous = Rendezvous.alone()
    if topology.world_size > 1:
        rendezvous = meet(
            rank,
            topology.world_size,
            url,
            facts=facts,
            interface=interface,
            join_timeout=join_timeout,
            timing=timing,
        )
    policy = ExitPolicy.connect(rendezvous, topology, timing=timing)
    groups = create_process_groups(
        topology,
        rendezvous,
        dist_backend=dist_backend,
        dp_backend="gloo" if dist_backend == "gloo" else "nccl",
        device=device,
        dist_timeout=dist_timeout,
        policy=policy,
        measures_links=measures_links,
    )
    return Rank(topology, rendezvous, policy, groups)


def member(
    ready: Path,
    rank: int,
    url: str,
    shape: tuple[int, int],
    program: RankProgram,
    dist_timeout: float,
    timing: Timing = DEFAULT_TIMING,
) -> None:
    """Enters a run and calls `program`, as the entry script would.

    Creates the file `ready` as soon as the program waits for another rank.
    """
    stages, replicas = shape
    timeouts: dict[str, Any] = {"dist_timeout": dist_timeout, "timing": timing}
    entered = enter(rank, url, num_stages=stages, num_replicas=replicas, **timeouts)
    entered.groups.control.all_reduce(torch.ones(1)).wait()
    threading.Thread(target=_await_waiting, args=(entered.policy, ready), daemon=True).start()
    try:
        program(entered)
    except PeerLostError as error:
        entered.policy.operation_failed(error)
    entered.close()


def _await_waiting(policy: ExitPolicy, ready: Path) -> None:
    before = policy.operation.text
    while policy.operation.text == before:
        time.sleep(0.001)
    ready.touch()
