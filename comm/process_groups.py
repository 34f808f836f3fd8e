"""The process groups of one rank: all ranks (control), its pipeline, and its stage's replicas."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from comm.backends.base import Group
from comm.backends.cupy_nccl import NcclCommunicator
from comm.backends.gloo import GlooCommunicator
from comm.backends.host_staging import HostStagingCommunicator
from comm.backends.single_process import SingleProcessCommunicator
from comm.backends.torch_nccl import (
    TorchNcclCommunicator,
    connect_all,
    connect_neighbours,
    connect_pairs,
)
from comm.communicator import Communicator, PeerLostError
from comm.liveness.failure_policy import ExitPolicy
from comm.rendezvous.join import Rendezvous
from comm.topology import Topology


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this process.

    control: all ranks, for host tensors; it shares no connection with other groups.
    pipeline: the stages of this replica, indexed by stage; for messages between neighbours. Over
        NCCL it has no collectives.
    replicas: the ranks that hold this stage, indexed by replica; for collectives.
    """

    control: Communicator
    pipeline: Communicator
    replicas: Communicator

    def close(self) -> None:
        """Closes every group; a closed group cannot be used again."""
        for communicator in (self.replicas, self.pipeline, self.control):
            communicator.close()


def create_process_groups(
    topology: Topology,
    rendezvous: Rendezvous,
    *,
    dist_backend: str,
    dp_backend: str,
    device: torch.device,
    dist_timeout: float,
    policy: ExitPolicy,
    measures_links: bool = False,
) -> ProcessGroups:
    """Creates the groups; every rank calls this, after `ExitPolicy.connect`.

    Args:
        dist_backend: for the pipeline: `cupy_nccl`, `nccl` (torch's NCCL backend) or `gloo`.
        dp_backend: for the replicas: `gloo` or `nccl`. Here `nccl` means torch's NCCL backend if
            dist_backend is `nccl` too; otherwise it means `cupy_nccl`. On a CPU only `gloo` works,
            unless a test replaces NCCL.
        dist_timeout: seconds that one operation may wait for a peer.
        measures_links: whether replicas send each other messages, as --check-cluster does.
        policy: the groups report to it their current operation, and errors of NCCL operations.

    Raises:
        ValueError: a group uses `cupy_nccl`, but CuPy or its NCCL is not installed.
        PeerLostError: a peer could not be reached.
    """
    if rendezvous.store is None or rendezvous.deadline is None:
        return ProcessGroups(*(SingleProcessCommunicator() for _ in range(3)))
    factory = _GroupFactory(
        topology, rendezvous.store.plain, device, dist_timeout, policy, measures_links
    )
    nccl = "nccl" if dist_backend == "nccl" else "cupy_nccl"
    try:
        # this timeout limits the creation of every group
        seconds = max(dist_timeout, rendezvous.deadline.remaining)
        dist.init_process_group(
            "gloo",
            store=factory.store,
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timedelta(seconds=seconds),
        )
        groups = factory.create(dist_backend, nccl if dp_backend == "nccl" else "gloo")
    except RuntimeError as error:  # from gloo or from the store
        participant = rendezvous.participants[topology.rank]
        raise PeerLostError(
            f"{topology.describe(topology.rank, host=participant.host)} could not connect to the "
            f"others over {participant.interface}: {str(error).rstrip('.')}."
        ) from error
    rendezvous.deadline.cancel()
    return groups


@dataclass(frozen=True)
class _GroupFactory:
    topology: Topology
    store: Store
    device: torch.device
    dist_timeout: float
    policy: ExitPolicy
    measures_links: bool

    def create(self, pipeline: str, replicas: str) -> ProcessGroups:
        """Creates the groups; the arguments name backends: `cupy_nccl`, `nccl` or `gloo`."""
        topology = self.topology
        pipelines = [topology.pipeline_ranks(r) for r in range(topology.num_replicas)]
        stages = [topology.replica_ranks(s) for s in range(topology.num_stages)]
        world = dist.group.WORLD
        assert world is not None
        everyone = tuple(range(topology.world_size))
        return ProcessGroups(
            control=GlooCommunicator(world, self._group("control", everyone)),
            pipeline=self._own_group("pipeline", pipelines, pipeline),
            replicas=self._own_group("replicas", stages, replicas),
        )

    def _own_group(
        self, name: str, groups: Sequence[tuple[int, ...]], backend: str
    ) -> Communicator:
        """Returns the communicator of the group in `groups` that contains this process.

        For `nccl` and `gloo`, which are torch's backends, every rank creates all of `groups`,
        because torch requires that all ranks create the same groups in the same order.
        """
        if len(groups[0]) == 1:
            return SingleProcessCommunicator()
        members = next(members for members in groups if self.topology.rank in members)
        group, device, on_hang = (
            self._group(name, members),
            self.device,
            self.policy.operation_failed,
        )
        if backend == "cupy_nccl":
            nccl = NcclCommunicator(group, device=device, store=self.store, on_hang=on_hang)
            if name == "pipeline":
                nccl.connect_neighbours()
            else:
                nccl.connect_all()
            return nccl
        if backend == "nccl":
            of_replicas = connect_pairs if self.measures_links else connect_all
            make = connect_neighbours if name == "pipeline" else of_replicas
            made = {ranks: make(ranks, dist_timeout=self.dist_timeout) for ranks in groups}
            return TorchNcclCommunicator(made[members], group, device=device, on_hang=on_hang)
        gloo_groups = {ranks: dist.new_group(list(ranks)) for ranks in groups}
        gloo = GlooCommunicator(gloo_groups[members], group)
        return gloo if device.type == "cpu" else HostStagingCommunicator(gloo, device)

    def _group(self, name: str, members: tuple[int, ...]) -> Group:
        return Group(name, members, self.topology, self.policy.operation, self.dist_timeout)
