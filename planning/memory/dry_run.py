"""The memory of one process of a run, computed by an iteration and an update on fake tensors.

A dry run needs no weights, no data and no other process: torch's FakeTensorMode creates tensors
with a shape, a dtype and a device, but without memory. The model, optimizer, schedule and engine of
a real run use these tensors, and live bytes are counted as in a real run
(`planning.memory.live_bytes`).
"""

import math
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from arguments.settings import Settings
from checkpoint.snapshot import Snapshot
from comm.backends.base import Group
from comm.backends.single_process import SingleProcessCommunicator
from comm.communicator import Communicator, CurrentOperation
from comm.topology import Topology
from common.tensors import DTYPES, part_sums
from modules.attention.cpu import MAX_LENGTH_PER_SIZE
from modules.attention.packed_documents import PackedDocuments
from modules.families.base import Family
from modules.layers.selective import MODES
from monitor.profiling.tracer import NO_TRACER
from optimizer.adam import Algorithm
from optimizer.build import ALGORITHMS, build_optimizer, checkpoint_bytes
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state_dict import collect_state
from pipeline_parallel.build import build_engine
from pipeline_parallel.p2p import MessageSpec, StageLink
from pipeline_parallel.partition.split import Split, stage_modules
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.schedule.validate import peak_in_flight
from planning.memory.fake_communicators import FakeGloo, FakeNccl
from planning.memory.fake_engine import FakeBatch, FakeEngine, peak_of_more
from planning.memory.fake_model import (
    SMALLEST_IN_8_BITS,
    Adam8bitStates,
    WithoutSteps,
    draw_no_dropout,
    fill_without_values,
    tensors_without_memory,
)
from planning.memory.live_bytes import LiveBytes
from planning.memory.measured_blocks import MeasuredStageModel
from planning.memory.stage_memory import StageMemory

ENOUGH = 5  # simulated microbatches beyond those in flight; they show the cost of further ones
GPU = "meta"  # torch's device without memory stands for a GPU; no GPU is needed


class PlannedModel(NamedTuple):
    """A model of a family, and the split of its layers over the stages."""

    family: Family
    config: Any
    layers: Split


class DryRun:
    """A dry run of a training run with these settings and this model, one process at a time.

    If `cuda` is true, the dry run models processes on GPUs; it needs no GPU itself. In this case
    attention saves the same tensors for backward as the GPU kernels: flash attention in half
    precision, the memory-efficient kernel in fp32. Memory of libraries other than torch, and memory
    inside an operator, is not counted.
    """

    def __init__(self, settings: Settings, model: PlannedModel, *, cuda: bool) -> None:
        self._settings, self._model, self._cuda = settings, model, cuda

    def of_rank(self, rank: int) -> StageMemory:
        """Returns the memory of the process with this global rank."""
        parallel = self._settings.parallel
        topology = Topology(rank, parallel.pipeline_group_size, parallel.data_group_size)
        return _Process(self._settings, self._model, topology, cuda=self._cuda).run()


class _Process:
    """One process of a dry run; the weights are made in `run`, so that their bytes are counted."""

    def __init__(
        self, settings: Settings, model: PlannedModel, topology: Topology, *, cuda: bool
    ) -> None:
        self._settings, self._topology, self._cuda = settings, topology, cuda
        self._config, self._sizes = model.config, model.family.sizes(model.config)
        self._device = torch.device(GPU if cuda else "cpu")
        self._documents, self._algorithm = self._make_documents(), self._make_algorithm()
        modules = stage_modules(topology.stage, model.layers)
        self._model = MeasuredStageModel(model.family, model.config, modules)

    def run(self) -> StageMemory:
        with tensors_without_memory() as live:
            fill_without_values(self._model, self._device)
            if self._cuda:
                draw_no_dropout(self._model)
            return self._run(self._make_optimizer(), live)

    def _run(self, optimizer: MixedPrecisionOptimizer, live: LiveBytes) -> StageMemory:
        kind = self._device.type
        offloads = self._cuda and self._settings.precision.use_offload
        built, offloaded = live.peak[kind], live.current["cpu"] if offloads else 0
        copy = self._copy(optimizer)
        copied = sum(_storages(copy).values())
        trained = self._train(optimizer, live)
        live.reset_peak()
        optimizer.step(lr=0.0, factor=1.0)
        self._save(optimizer)
        peak = max(built, trained, live.peak[kind])
        return self._memory(optimizer, offloaded=offloaded, copied=copied, peak=peak)

    def _make_documents(self) -> PackedDocuments | None:
        """Returns documents whose lengths need the most memory; None without --pack document.

        The lengths of real documents depend on the data, so the dry run uses the lengths for which
        attention on a CPU keeps the most bytes, also for GPUs in fp32. On GPUs in half precision,
        documents of any length need the same memory, so each row is one document.
        """
        if self._settings.data.pack != "document":
            return None
        seq_len = self._settings.update.seq_length
        longest = min(seq_len - 1, MAX_LENGTH_PER_SIZE * self._sizes.head_size)
        if self._cuda and self._settings.precision.precision != "fp32":
            longest = seq_len
        doc_starts = torch.arange(seq_len) // longest * longest
        return FakeBatch.documents_of(doc_starts.repeat(self._settings.update.micro_batch_size, 1))

    def _make_algorithm(self) -> Algorithm:
        """Creates --optimizer's algorithm; computes 8bit-adam's tables while tensors are real."""
        name = self._settings.update.optimizer
        if name == Adam8bitStates.kind and (self._cuda or find_spec("bitsandbytes") is None):
            return Adam8bitStates()
        algorithm = ALGORITHMS[name]()
        algorithm.empty_state(torch.zeros(SMALLEST_IN_8_BITS))
        return WithoutSteps(algorithm) if self._cuda else algorithm

    def _make_optimizer(self) -> MixedPrecisionOptimizer:
        settings, topology = self._settings, self._topology
        return build_optimizer(
            self._model,
            self._algorithm,
            precision=settings.precision.precision,
            weight_decay=settings.update.weight_decay,
            offload=settings.precision.use_offload,
            zero_stage=settings.parallel.zero_stage,
            dp_mode=settings.parallel.dp_mode,
            replicas=self._group("replicas", topology.replica_ranks(topology.stage)),
        )

    def _copy(self, optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
        """Creates the copy of the state for --async-checkpoint; empty if this rank keeps none.

        As in a run, copies of tensors on a GPU are pinned, and copies of tensors in host memory are
        not: of an offloaded state, and of a state that another replica sends.
        """
        if not self._settings.checkpoint.async_checkpoint or self._topology.replica != 0:
            return []
        weights = dict(self._model.named_parameters())
        copy = Snapshot().take({"weights": weights, "optimizer": self._state(optimizer)})
        return [leaf for leaf in tree_leaves(copy) if isinstance(leaf, Tensor)]

    def _state(self, optimizer: MixedPrecisionOptimizer) -> dict[str, Any]:
        control = self._gloo("control", tuple(range(self._topology.world_size)))
        return collect_state(optimizer, control, self._topology)

    def _save(self, optimizer: MixedPrecisionOptimizer) -> None:
        for tensor in (*map(optimizer.weight_of, optimizer.names), *_kept(optimizer)):
            for _ in islice(part_sums(tensor), 2):  # later parts need no more memory
                pass
        if self._topology.replica == 0:
            self._state(optimizer)

    def _train(self, optimizer: MixedPrecisionOptimizer, live: LiveBytes) -> int:
        """Returns the peak bytes of one iteration and of the exchange of its gradients."""
        settings, update, topology = self._settings, self._settings.update, self._topology
        all_held = settings.parallel.pp_mode == "gpipe"
        enough = ENOUGH if all_held else topology.num_stages + ENOUGH
        count = min(update.num_microbatches, enough)
        pipeline = self._group("pipeline", topology.pipeline_ranks(topology.replica))
        shape = update.micro_batch_size, update.seq_length, self._config.hidden_size
        dtype = DTYPES[settings.precision.precision]
        engine = build_engine(
            self._model,
            StageLink(pipeline, MessageSpec(shape, dtype, self._device)),
            gradients=optimizer.gradients.buffer,
            schedule=settings.parallel.pp_mode,
            recompute=MODES[settings.precision.recompute],
            num_microbatches=count,
            tracer=NO_TRACER,
            kind=FakeEngine,
        )
        assert isinstance(engine, FakeEngine)
        watched = engine.watch(live, self._device.type)
        batch, ahead = (self._batch() for _ in range(2))
        self._model.measure_blocks(
            optimizer.gradients.buffer,
            live,
            torch.empty(shape, dtype=dtype, device=self._device),
            batch.documents(0, self._device),
            recompute=MODES[settings.precision.recompute],
            splits=splits_backward(
                SCHEDULES[settings.parallel.pp_mode], topology.stage, topology.num_stages
            ),
        )
        optimizer.gradients.begin_update(count)
        engine.train(batch, loss_scale=1.0)
        live.reset_peak()
        optimizer.gradients.finish_exchange()
        del batch, ahead
        gradient = math.prod(shape) * dtype.itemsize if topology.stage > 0 else 0
        more = update.num_microbatches - count if all_held else 0
        return max(peak_of_more(watched, more, sent=gradient), live.peak[self._device.type])

    def _batch(self) -> FakeBatch:
        update, topology = self._settings.update, self._topology
        token_ids, labels = (
            torch.empty(
                (update.batch_size, update.seq_length), dtype=torch.int64, device=self._device
            )
            if needed
            else None
            for needed in (topology.is_first, topology.is_last)
        )
        keys = range(update.batch_size)
        return FakeBatch(token_ids, labels, keys, update.micro_batch_size, self._documents)

    def _memory(
        self, optimizer: MixedPrecisionOptimizer, *, offloaded: int, copied: int, peak: int
    ) -> StageMemory:
        settings, topology = self._settings, self._topology
        weights, states = _storages(self._model.parameters()), _storages(_kept(optimizer))
        count = sum(p.numel() for p in self._model.parameters())
        state = sum(size for key, size in states.items() if key not in weights)
        precision, algorithm = settings.precision.precision, settings.update.optimizer
        schedule = SCHEDULES[settings.parallel.pp_mode]
        num_microbatches = settings.update.num_microbatches
        return StageMemory(
            parameters=count,
            weights=sum(weights.values()),
            gradients=optimizer.gradients.buffer.flat.nbytes,
            optimizer=0 if offloaded else state,
            offloaded=offloaded,
            host_copy=copied if self._cuda else 0,
            copied=0 if self._cuda else copied,
            peak=peak,
            held=peak_in_flight(schedule, topology.stage, topology.num_stages, num_microbatches),
            checkpoint=sum(checkpoint_bytes(count, precision=precision, optimizer=algorithm)),
        )

    def _group(self, name: str, members: tuple[int, ...]) -> Communicator:
        if len(members) == 1:
            return SingleProcessCommunicator()
        if self._cuda:
            return FakeNccl(Group(name, members, self._topology, CurrentOperation(), 1.0))
        return self._gloo(name, members)

    def _gloo(self, name: str, members: tuple[int, ...]) -> FakeGloo:
        return FakeGloo(Group(name, members, self._topology, CurrentOperation(), 1.0))


def _kept(optimizer: MixedPrecisionOptimizer) -> list[Tensor]:
    """Returns the masters and the moments of the optimizer."""
    moments = (moment for state in optimizer.moments.values() for moment in state.values())
    return [*optimizer.masters.values(), *moments]


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Returns the bytes of each storage, by the storage's address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in storages}
