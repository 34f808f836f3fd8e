"""All channels of one process, made once: control, its pipeline, and its stage's replicas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from comm.communicator import Communicator, PeerLostError
from comm.gloo_backend import GlooCommunicator
from comm.host_copy import HostCopyCommunicator
from comm.local import LocalCommunicator
from comm.nccl_backend import NcclCommunicator
from comm.rendezvous import Rendezvous
from comm.topology import Topology
from comm.watch import Watch


@dataclass(frozen=True)
class Fabric:
    """The groups that this process belongs to.

    control: all ranks, host tensors, its own connections: never mixes with activations.
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


def connect(
    topology: Topology,
    rendezvous: Rendezvous,
    *,
    dist_backend: str,
    dp_backend: str,
    device: torch.device,
    dist_timeout: float,
    watch: Watch,
) -> Fabric:
    """Makes the groups; every rank calls it, after the liveness link stands.

    dist_backend: `cupy_nccl` or `gloo`, for the pipeline on CUDA; on CPU always gloo.
    dp_backend: `nccl` or `gloo`, for the replicas on CUDA; on CPU always gloo.
    dist_timeout: seconds that one operation may wait for a peer.
    watch: is told what this process waits for, and ends it when a CUDA channel hangs.

    Raises:
        ValueError: cupy_nccl is asked for and CuPy is not installed.
        PeerLostError: a peer could not be reached.
    """
    if rendezvous.store is None or rendezvous.watchdog is None:
        return Fabric(LocalCommunicator(), LocalCommunicator(), LocalCommunicator())
    maker = _Maker(topology, rendezvous.store, device, dist_timeout, watch)
    try:
        maker.open_world(timeout=max(dist_timeout, rendezvous.watchdog.left))
        fabric = maker.make(
            pipeline_on_nccl=dist_backend == "cupy_nccl" and device.type == "cuda",
            replicas_on_nccl=dp_backend == "nccl" and device.type == "cuda",
        )
    except RuntimeError as error:  # gloo's and the store's
        raise PeerLostError(f"the ranks could not connect to each other: {error}") from error
    rendezvous.watchdog.cancel()
    return fabric


class _Maker:
    def __init__(
        self,
        topology: Topology,
        store: Store,
        device: torch.device,
        dist_timeout: float,
        watch: Watch,
    ) -> None:
        self._topology = topology
        self._store = store
        self._device = device
        self._dist_timeout = dist_timeout
        self._watch = watch

    def open_world(self, *, timeout: float) -> None:
        """The gloo group of all ranks; `timeout` holds for making groups, this one and others."""
        dist.init_process_group(
            "gloo",
            store=self._store,
            rank=self._topology.rank,
            world_size=self._topology.world_size,
            timeout=timedelta(seconds=timeout),
        )

    def make(self, *, pipeline_on_nccl: bool, replicas_on_nccl: bool) -> Fabric:
        topology = self._topology
        pipelines = [topology.pipeline_ranks(r) for r in range(topology.num_replicas)]
        replicas = [topology.replica_ranks(s) for s in range(topology.num_stages)]
        world = dist.group.WORLD
        assert world is not None
        return Fabric(
            control=self._gloo("control", world, range(topology.world_size)),
            pipeline=self._one_of("pipeline", pipelines, nccl=pipeline_on_nccl),
            replicas=self._one_of("replicas", replicas, nccl=replicas_on_nccl),
        )

    def _one_of(self, name: str, groups: Sequence[tuple[int, ...]], *, nccl: bool) -> Communicator:
        """This process's group among `groups`; all ranks make all of gloo's, in this order."""
        if len(groups[0]) == 1:
            return LocalCommunicator()
        mine = next(members for members in groups if self._topology.rank in members)
        if nccl:
            return self._nccl(name, mine)
        made = {members: dist.new_group(list(members)) for members in groups}
        gloo = self._gloo(name, made[mine], mine)
        return gloo if self._device.type == "cpu" else HostCopyCommunicator(gloo)

    def _nccl(self, name: str, members: Sequence[int]) -> Communicator:
        return NcclCommunicator(
            name=name,
            members=members,
            topology=self._topology,
            device=self._device,
            store=self._store,
            activity=self._watch.activity,
            dist_timeout=self._dist_timeout,
            on_hang=self._watch.explain,
        )

    def _gloo(self, name: str, group: dist.ProcessGroup, members: Sequence[int]) -> Communicator:
        return GlooCommunicator(
            group,
            name=name,
            members=members,
            topology=self._topology,
            activity=self._watch.activity,
            dist_timeout=self._dist_timeout,
        )
