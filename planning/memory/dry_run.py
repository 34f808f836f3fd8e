"""What a process of a run will hold in memory: an iteration and an update with fake tensors.

No weights, no data, no other process: torch's FakeTensorMode gives tensors that have a shape, a
type and a device, and no memory. The run's own model, optimizer, schedule and engine work on them,
and what is alive is counted as a run counts it (`planning.memory.live_bytes`).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arguments.settings import Settings
from comm.backends.base import Group
from comm.communicator import Communicator, CurrentOperation
from comm.topology import Topology
from common.tensors import DTYPES, part_sums
from modules.attention.cpu import MAX_LENGTH_PER_SIZE
from modules.attention.packed_documents import PackedDocuments
from modules.families.base import Family
from modules.stage_model import StageModel
from monitor.profiling.tracer import NO_TRACER
from optimizer.adam import Algorithm
from optimizer.build import ALGORITHMS, build_optimizer, checkpoint_bytes
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state_dict import collect_state, empty_state
from pipeline_parallel.build import build_engine
from pipeline_parallel.p2p import StageLink
from pipeline_parallel.partition.split import Split, stage_modules
from pipeline_parallel.schedule.schedules import SCHEDULES
from pipeline_parallel.schedule.validate import peak_in_flight
from planning.memory.fake_communicators import FakeGloo, FakeNccl, FakeSingleProcess
from planning.memory.fake_engine import FakeBatch, FakeEngine, peak_of_more
from planning.memory.fake_model import (
    WithoutSteps,
    draw_no_dropout,
    fill_without_values,
    tensors_without_memory,
)
from planning.memory.live_bytes import LiveBytes

ENOUGH = 5  # microbatches that show what more of them cost, beside those that a schedule holds
SMALLEST_IN_8_BITS = 4096  # numbers of a weight, below which bitsandbytes keeps fp32 moments
GPU = "meta"  # torch's device without memory stands for a GPU, which need not be there


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one process; `peak` is of its device and the most that is alive at once.

    `weights`, `gradients` and `optimizer` (masters and moments) lie on the device all the time;
    `host` is what --use-offload keeps in the host's memory instead, and --async-checkpoint's copy,
    which is `copied` where host and device are one. `held` is how many microbatches are between
    forward and the end of backward at once; `checkpoint` is on disk.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int
    copied: int
    peak: int
    held: int
    checkpoint: int

    @property
    def activations(self) -> int:
        """What comes on top at the peak: activations, messages, and what is made on the way."""
        return self.peak - self.weights - self.gradients - self.optimizer - self.copied


class PlannedModel(NamedTuple):
    """A model of a family, and the split of its layers over the stages."""

    family: Family
    config: Any
    layers: Split


class DryRun:
    """The processes of a run with these settings and this model.

    cuda: on GPUs, as far as that can be told without one: attention keeps what flash attention
    (half precision) and the memory-efficient kernel (fp32) keep; what libraries other than torch
    take, and the operators inside themselves, is left out.
    """

    def __init__(self, settings: Settings, model: PlannedModel, *, cuda: bool) -> None:
        self._settings, (self._family, self._config, self._layers) = settings, model
        self._cuda, self._device = cuda, torch.device(GPU if cuda else "cpu")

    def of_rank(self, rank: int) -> StageMemory:
        """What the process of this global rank will hold."""
        parallel = self._settings.parallel
        topology = Topology(rank, parallel.pipeline_group_size, parallel.data_group_size)
        documents, algorithm = self._documents(), self._algorithm()
        modules = stage_modules(topology.stage, self._layers)
        model = StageModel(self._family, self._config, modules, device="meta")
        with tensors_without_memory() as live:
            fill_without_values(model, self._device)
            return self._run(model, topology, documents, algorithm, live)

    def _run(
        self,
        model: StageModel,
        topology: Topology,
        documents: PackedDocuments | None,
        algorithm: Algorithm,
        live: LiveBytes,
    ) -> StageMemory:
        kind = self._device.type
        if self._cuda:
            draw_no_dropout(model)
        replicas = self._group("replicas", topology.replica_ranks(topology.stage), topology)
        settings = self._settings
        optimizer = build_optimizer(
            model,
            algorithm,
            precision=settings.precision.precision,
            weight_decay=settings.update.weight_decay,
            offload=settings.precision.use_offload,
            zero_stage=settings.parallel.zero_stage,
            dp_mode=settings.parallel.dp_mode,
            replicas=replicas,
        )
        offloads = self._cuda and self._settings.precision.use_offload
        built, host = live.peak[kind], live.current["cpu"] if offloads else 0
        copy = self._copy(model, optimizer, topology)
        copied = sum(map(_pinned if self._cuda else int, _storages(copy).values()))
        trained = self._train(model, optimizer, topology, documents, live)
        live.reset_peak()
        optimizer.step(lr=0.0, factor=1.0)
        self._save(optimizer, topology)
        peak = max(built, trained, live.peak[kind])
        return self._memory(model, optimizer, topology, host=host, copied=copied, peak=peak)

    def _copy(
        self, model: StageModel, optimizer: MixedPrecisionOptimizer, topology: Topology
    ) -> list[Tensor]:
        """What --async-checkpoint keeps in host memory."""
        if not self._settings.checkpoint.async_checkpoint or topology.replica != 0:
            return []
        names = optimizer.names
        state = [part for name in names for part in empty_state(optimizer, name).values()]
        return [*state, *(torch.empty_like(p, device="cpu") for p in model.parameters())]

    def _save(self, optimizer: MixedPrecisionOptimizer, topology: Topology) -> None:
        for tensor in (*map(optimizer.weight_of, optimizer.names), *_kept(optimizer)):
            for _ in part_sums(tensor):
                pass
        if topology.replica == 0:
            control = self._gloo("control", tuple(range(topology.world_size)), topology)
            collect_state(optimizer, control, topology)

    def _train(
        self,
        model: StageModel,
        optimizer: MixedPrecisionOptimizer,
        topology: Topology,
        documents: PackedDocuments | None,
        live: LiveBytes,
    ) -> int:
        """The most bytes that are alive in an iteration that ends an update."""
        settings, update = self._settings, self._settings.update
        all_held = settings.parallel.pp_mode == "gpipe"
        enough = ENOUGH if all_held else topology.num_stages + ENOUGH
        count = min(update.num_microbatches, enough)
        pipeline = self._group("pipeline", topology.pipeline_ranks(topology.replica), topology)
        shape = (update.micro_batch_size, update.seq_length, self._config.hidden_size)
        dtype = DTYPES[settings.precision.precision]
        engine = build_engine(
            model,
            StageLink(pipeline, shape=shape, dtype=dtype, device=self._device),
            gradients=optimizer.gradients.buffer,
            schedule=settings.parallel.pp_mode,
            recompute=settings.precision.recompute,
            num_microbatches=count,
            tracer=NO_TRACER,
            kind=FakeEngine,
        )
        assert isinstance(engine, FakeEngine)
        watched = engine.watch(live, self._device.type)
        batch, ahead = (self._batch(topology, documents) for _ in range(2))
        optimizer.gradients.begin_update(count)
        engine.train(batch, loss_scale=1.0)
        live.reset_peak()
        optimizer.gradients.finish_exchange()
        del batch, ahead
        gradient = math.prod(shape) * dtype.itemsize if topology.stage > 0 else 0
        more = update.num_microbatches - count if all_held else 0
        return max(peak_of_more(watched, more, sent=gradient), live.peak[self._device.type])

    def _batch(self, topology: Topology, documents: PackedDocuments | None) -> FakeBatch:
        update = self._settings.update
        shape = (update.batch_size, update.seq_length)
        tokens, labels = (
            torch.empty(shape, dtype=torch.int64, device=self._device) if needed else None
            for needed in (topology.is_first, topology.is_last)
        )
        return FakeBatch(
            tokens,
            labels,
            rows=update.micro_batch_size,
            num_rows=update.batch_size,
            documents=documents,
        )

    def _documents(self) -> PackedDocuments | None:
        """Documents that cost as much as any; their lengths are not known without the data.

        On CPUs those that attention keeps the most of. One kernel of GPUs in half precision takes
        them as it takes rows.
        """
        if self._settings.data.pack != "document":
            return None
        tokens = self._settings.update.seq_length
        heads = self._config.num_attention_heads
        longest = min(tokens - 1, MAX_LENGTH_PER_SIZE * (self._config.hidden_size // heads))
        if self._cuda and self._settings.precision.precision != "fp32":
            longest = tokens
        begins = torch.arange(tokens) // longest * longest
        return FakeBatch.documents_of(begins.repeat(self._settings.update.micro_batch_size, 1))

    def _memory(
        self,
        model: StageModel,
        optimizer: MixedPrecisionOptimizer,
        topology: Topology,
        *,
        host: int,
        copied: int,
        peak: int,
    ) -> StageMemory:
        settings = self._settings
        weights = _storages(model.parameters())
        kept = _storages(_kept(optimizer))
        count = sum(p.numel() for p in model.parameters())
        own = {key: size for key, size in kept.items() if key not in weights}
        return StageMemory(
            parameters=count,
            weights=sum(weights.values()),
            gradients=optimizer.gradients.buffer.flat.nbytes,
            optimizer=0 if host else sum(own.values()),
            host=host + (copied if self._cuda else 0),
            copied=0 if self._cuda else copied,
            peak=peak,
            held=peak_in_flight(
                SCHEDULES[settings.parallel.pp_mode],
                topology.stage,
                topology.num_stages,
                settings.update.num_microbatches,
            ),
            checkpoint=sum(
                checkpoint_bytes(
                    count,
                    precision=settings.precision.precision,
                    optimizer=settings.update.optimizer,
                )
            ),
        )

    def _algorithm(self) -> Algorithm:
        """That of the flags. What it makes once, from numbers, is made here."""
        algorithm = ALGORITHMS[self._settings.update.optimizer]()
        algorithm.empty_state(torch.zeros(SMALLEST_IN_8_BITS))
        return WithoutSteps(algorithm) if self._cuda else algorithm

    def _group(self, name: str, members: tuple[int, ...], topology: Topology) -> Communicator:
        if len(members) == 1:
            return FakeSingleProcess()
        if self._cuda:
            return FakeNccl(Group(name, members, topology, CurrentOperation(), 1.0))
        return self._gloo(name, members, topology)

    def _gloo(self, name: str, members: tuple[int, ...], topology: Topology) -> FakeGloo:
        return FakeGloo(Group(name, members, topology, CurrentOperation(), 1.0))


def _kept(optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
    """Masters and moments."""
    of_weights = optimizer.moments.values()
    return [*optimizer.masters.values(), *(one for kept in of_weights for one in kept.values())]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of all storages, each once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}


def _pinned(size: int) -> int:
    """The bytes of a pinned buffer: torch's CachingHostAllocator takes powers of two."""
    return 1 << max(size - 1, 0).bit_length()
