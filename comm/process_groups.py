"""The process groups of one rank, made once: control, its pipeline, and its stage's replicas."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from comm.backends.cupy_nccl import NcclCommunicator
from comm.backends.gloo import GlooCommunicator
from comm.backends.host_staging import HostStagingCommunicator
from comm.backends.single_process import SingleProcessCommunicator
from comm.backends.torch_nccl import TorchNcclCommunicator, make_groups
from comm.communicator import Communicator, PeerLostError
from comm.liveness.failure_policy import ExitPolicy
from comm.rendezvous.join import Rendezvous
from comm.topology import Topology


@dataclass(frozen=True)
class ProcessGroups:
    """The groups of this process.

    control: all ranks, host tensors, over connections of its own, apart from activations.
    pipeline: the stages of this replica, indexed by stage.
    replicas: this stage in all replicas, indexed by replica.
    """

    control: Communicator
    pipeline: Communicator
    replicas: Communicator

    def close(self) -> None:
        """Closes every group; none can be used again."""
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
) -> ProcessGroups:
    """Makes the groups; every rank calls it, after `ExitPolicy.connect`.

    Args:
        dist_backend: `cupy_nccl`, `nccl` (torch's own) or `gloo`, for the pipeline.
        dp_backend: `nccl` or `gloo`, for the replicas; `nccl` is CuPy's, or torch's if dist_backend
            is `nccl`. On a CPU only gloo works, unless a test replaces NCCL.
        dist_timeout: seconds that one operation may wait for a peer.
        policy: gets the name of the current operation, and an operation on CUDA that hangs.

    Raises:
        ValueError: cupy_nccl is asked for and CuPy is not installed.
        PeerLostError: a peer could not be reached.
    """
    if rendezvous.store is None or rendezvous.deadline is None:
        return ProcessGroups(*(SingleProcessCommunicator() for _ in range(3)))
    factory = _GroupFactory(topology, rendezvous.store.plain, device, dist_timeout, policy)
    try:
        factory.init_world(timeout=max(dist_timeout, rendezvous.deadline.remaining))
        cupy_or_torch = "nccl" if dist_backend == "nccl" else "cupy_nccl"
        groups = factory.create(
            pipeline=dist_backend,
            replicas=cupy_or_torch if dp_backend == "nccl" else "gloo",
        )
    except RuntimeError as error:  # gloo's and the store's
        participant = rendezvous.participants[topology.rank]
        raise PeerLostError(
            f"{topology.describe(topology.rank, host=participant.host)} could not connect to the "
            f"others over {participant.interface}: {str(error).rstrip('.')}."
        ) from error
    rendezvous.deadline.cancel()
    return groups


class _GroupFactory:
    def __init__(
        self,
        topology: Topology,
        store: Store,
        device: torch.device,
        dist_timeout: float,
        policy: ExitPolicy,
    ) -> None:
        self._topology = topology
        self._store = store
        self._device = device
        self._dist_timeout = dist_timeout
        self._policy = policy

    def init_world(self, *, timeout: float) -> None:
        """Makes the gloo group of all ranks; `timeout` (s) holds for making any group."""
        dist.init_process_group(
            "gloo",
            store=self._store,
            rank=self._topology.rank,
            world_size=self._topology.world_size,
            timeout=timedelta(seconds=timeout),
        )

    def create(self, *, pipeline: str, replicas: str) -> ProcessGroups:
        """Makes the groups, each over `cupy_nccl`, `nccl` or `gloo`."""
        topology = self._topology
        pipelines = [topology.pipeline_ranks(r) for r in range(topology.num_replicas)]
        stages = [topology.replica_ranks(s) for s in range(topology.num_stages)]
        world = dist.group.WORLD
        assert world is not None
        return ProcessGroups(
            control=self._gloo("control", world, range(topology.world_size)),
            pipeline=self._own_group("pipeline", pipelines, pipeline),
            replicas=self._own_group("replicas", stages, replicas),
        )

    def _own_group(
        self, name: str, groups: Sequence[tuple[int, ...]], backend: str
    ) -> Communicator:
        """Returns this process's group among `groups`; all ranks make all of torch's, in order."""
        if len(groups[0]) == 1:
            return SingleProcessCommunicator()
        members = next(members for members in groups if self._topology.rank in members)
        if backend == "cupy_nccl":
            return self._cupy_nccl(name, members)
        if backend == "nccl":
            return self._torch_nccl(name, groups, members)
        torch_groups = {each: dist.new_group(list(each)) for each in groups}
        gloo = self._gloo(name, torch_groups[members], members)
        return gloo if self._device.type == "cpu" else HostStagingCommunicator(gloo)

    def _torch_nccl(
        self, name: str, groups: Sequence[tuple[int, ...]], members: Sequence[int]
    ) -> Communicator:
        torch_groups = {each: make_groups(each, dist_timeout=self._dist_timeout) for each in groups}
        return TorchNcclCommunicator(
            torch_groups[tuple(members)],
            name=name,
            members=members,
            topology=self._topology,
            device=self._device,
            operation=self._policy.operation,
            dist_timeout=self._dist_timeout,
            on_hang=self._policy.operation_failed,
        )

    def _cupy_nccl(self, name: str, members: Sequence[int]) -> Communicator:
        communicator = NcclCommunicator(
            name=name,
            members=members,
            topology=self._topology,
            device=self._device,
            store=self._store,
            operation=self._policy.operation,
            dist_timeout=self._dist_timeout,
            on_hang=self._policy.operation_failed,
        )
        if name == "pipeline":
            communicator.connect_neighbours()
        return communicator

    def _gloo(self, name: str, group: dist.ProcessGroup, members: Sequence[int]) -> Communicator:
        return GlooCommunicator(
            group,
            name=name,
            members=members,
            topology=self._topology,
            operation=self._policy.operation,
            dist_timeout=self._dist_timeout,
        )
