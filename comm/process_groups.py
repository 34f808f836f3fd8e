"""All channels of one process, made once: control, its pipeline, and its stage's replicas."""

from __future__ import annotations

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
from comm.liveness.failure_detector import FailureDetector
from comm.rendezvous.join import Rendezvous
from comm.topology import Topology


@dataclass(frozen=True)
class ProcessGroups:
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


def create_process_groups(
    topology: Topology,
    rendezvous: Rendezvous,
    *,
    dist_backend: str,
    dp_backend: str,
    device: torch.device,
    dist_timeout: float,
    watch: FailureDetector,
) -> ProcessGroups:
    """Makes the groups; every rank calls it, after the liveness link stands.

    dist_backend: `cupy_nccl`, `nccl` (torch's own) or `gloo`, for the pipeline.
    dp_backend: `nccl` or `gloo`, for the replicas; `nccl` is CuPy's, or torch's where dist_backend
        is `nccl`. On a CPU only gloo works, unless a test puts doubles in the place of NCCL.
    dist_timeout: seconds that one operation may wait for a peer.
    watch: is told what this process waits for, and ends it when a CUDA channel hangs.

    Raises:
        ValueError: cupy_nccl is asked for and CuPy is not installed.
        PeerLostError: a peer could not be reached.
    """
    if rendezvous.store is None or rendezvous.watchdog is None:
        return ProcessGroups(
            SingleProcessCommunicator(), SingleProcessCommunicator(), SingleProcessCommunicator()
        )
    maker = _Maker(topology, rendezvous.store, device, dist_timeout, watch)
    try:
        maker.open_world(timeout=max(dist_timeout, rendezvous.watchdog.left))
        cupy_or_torch = "nccl" if dist_backend == "nccl" else "cupy_nccl"
        fabric = maker.make(
            pipeline=dist_backend,
            replicas=cupy_or_torch if dp_backend == "nccl" else "gloo",
        )
    except RuntimeError as error:  # gloo's and the store's
        here = rendezvous.roster[topology.rank]
        raise PeerLostError(
            f"{topology.describe(topology.rank)[:-1]}, host {here.host}) could not connect to the "
            f"others over {here.interface}: {str(error).rstrip('.')}."
        ) from error
    rendezvous.watchdog.cancel()
    return fabric


class _Maker:
    def __init__(
        self,
        topology: Topology,
        store: Store,
        device: torch.device,
        dist_timeout: float,
        watch: FailureDetector,
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

    def make(self, *, pipeline: str, replicas: str) -> ProcessGroups:
        """Each over `cupy_nccl`, `nccl` or `gloo`."""
        topology = self._topology
        pipelines = [topology.pipeline_ranks(r) for r in range(topology.num_replicas)]
        stages = [topology.replica_ranks(s) for s in range(topology.num_stages)]
        world = dist.group.WORLD
        assert world is not None
        return ProcessGroups(
            control=self._gloo("control", world, range(topology.world_size)),
            pipeline=self._one_of("pipeline", pipelines, pipeline),
            replicas=self._one_of("replicas", stages, replicas),
        )

    def _one_of(self, name: str, groups: Sequence[tuple[int, ...]], backend: str) -> Communicator:
        """This process's group among `groups`; all ranks make all of torch's, in this order."""
        if len(groups[0]) == 1:
            return SingleProcessCommunicator()
        mine = next(members for members in groups if self._topology.rank in members)
        if backend == "cupy_nccl":
            return self._cupy_nccl(name, mine)
        if backend == "nccl":
            return self._torch_nccl(name, groups, mine)
        made = {members: dist.new_group(list(members)) for members in groups}
        gloo = self._gloo(name, made[mine], mine)
        return gloo if self._device.type == "cpu" else HostStagingCommunicator(gloo)

    def _torch_nccl(
        self, name: str, groups: Sequence[tuple[int, ...]], members: Sequence[int]
    ) -> Communicator:
        made = {each: make_groups(each, dist_timeout=self._dist_timeout) for each in groups}
        return TorchNcclCommunicator(
            made[tuple(members)],
            name=name,
            members=members,
            topology=self._topology,
            device=self._device,
            activity=self._watch.activity,
            dist_timeout=self._dist_timeout,
            on_hang=self._watch.explain,
        )

    def _cupy_nccl(self, name: str, members: Sequence[int]) -> Communicator:
        return NcclCommunicator(
            name=name,
            members=members,
            topology=self._topology,
            device=self._device,
            store=self._store,
            activity=self._watch.activity,
            dist_timeout=self._dist_timeout,
            on_hang=self._watch.explain,
            is_chain=name == "pipeline",
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
