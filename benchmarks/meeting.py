"""Connection of a benchmark's processes over loopback, with the code that a training run uses."""

from collections.abc import Callable

import torch

from comm.liveness.failure_policy import ExitPolicy
from comm.process_groups import ProcessGroups, create_process_groups
from comm.rendezvous.interface import Interface
from comm.rendezvous.job_key import JobKey
from comm.rendezvous.join import join
from comm.topology import Topology


def meet(topology: Topology, port: int) -> tuple[ProcessGroups, Callable[[], None]]:
    """Connects this process to the others; returns the groups, and a function that closes them."""
    rendezvous = join(
        url=f"tcp://127.0.0.1:{port}",
        rank=topology.rank,
        world_size=topology.world_size,
        interface=Interface("lo", "127.0.0.1"),
        facts={},
        key=JobKey("benchmark"),
        start="",
        join_timeout=120.0,
    )
    policy = ExitPolicy.connect(rendezvous, topology)
    groups = create_process_groups(
        topology,
        rendezvous,
        dist_backend="gloo",
        dp_backend="gloo",
        device=torch.device("cpu"),
        dist_timeout=600.0,
        policy=policy,
    )

    def close() -> None:
        groups.close()
        policy.detector.close()

    return groups, close
