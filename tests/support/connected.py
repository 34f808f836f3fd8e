"""What a rank of a test does to have all its channels, as the entry script would."""

import os
from dataclasses import dataclass

import torch

from comm.liveness.failure_policy import ExitPolicy
from comm.process_groups import ProcessGroups, create_process_groups
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import choose_interface, export
from comm.rendezvous.job_key import JobKey
from comm.rendezvous.join import Rendezvous, join
from comm.rendezvous.participants import Fact
from comm.topology import Topology


@dataclass(frozen=True)
class Rank:
    """One process of a run, joined and connected."""

    topology: Topology
    rendezvous: Rendezvous
    policy: ExitPolicy
    groups: ProcessGroups

    def close(self) -> None:
        self.groups.close()
        self.policy.detector.close()


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
) -> Rank:
    topology = Topology(rank=rank, num_stages=num_stages, num_replicas=num_replicas)
    interface = choose_interface(flag=None, master_host=parse_dist_url(url)[0], environ=os.environ)
    export(interface, os.environ)
    rendezvous = join(
        url=url,
        rank=rank,
        world_size=topology.world_size,
        interface=interface,
        facts=facts or {},
        key=JobKey("test"),
        start="",
        join_timeout=join_timeout,
    )
    return link(topology, rendezvous, dist_backend=dist_backend, dist_timeout=dist_timeout)


def link(
    topology: Topology, rendezvous: Rendezvous, *, dist_backend: str, dist_timeout: float
) -> Rank:
    """All channels of a process that has met the others."""
    policy = ExitPolicy.connect(rendezvous, topology)
    groups = create_process_groups(
        topology,
        rendezvous,
        dist_backend=dist_backend,
        dp_backend="gloo" if dist_backend == "gloo" else "nccl",
        device=torch.device("cpu"),
        dist_timeout=dist_timeout,
        policy=policy,
    )
    return Rank(topology, rendezvous, policy, groups)
