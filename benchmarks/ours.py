"""Our side of `pipeline.py`: the training loop itself, with a feed that repeats one batch."""

from __future__ import annotations

import math
from typing import Any

import torch

from arguments.settings import LoopSettings
from benchmarks.overhead import engine_overhead
from benchmarks.work import LR, MAX_NORM, WEIGHT_DECAY, Work
from comm.lifecycle.stop_signals import StopRequest
from comm.process_groups import ProcessGroups
from comm.topology import Topology
from common.tensors import DTYPES
from modules.build import parameter_names
from modules.registry import MODELS
from modules.stage_model import StageModel
from monitor.profiling.tracer import NO_TRACER, HostTracer, StepLog, Tracer
from monitor.recorder import SilentRecorder
from optimizer.adam import Adam
from optimizer.loss_scaler import make_scaler
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.update import UpdateStep
from pipeline_parallel.batch_scatter import Rows
from pipeline_parallel.engine import Engine
from pipeline_parallel.p2p import StageLink
from pipeline_parallel.partition.split import stage_modules
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.stage import Stage
from training.step_totals import TotalsReducer
from training.trainer import Trainer

CPU = torch.device("cpu")
FAMILY = MODELS["gptneox"].load()


class Ours:
    """One stage of our pipeline under the schedule named `pp_mode`.

    traced: as --profiling does.
    """

    def __init__(
        self, work: Work, pp_mode: str, topology: Topology, fabric: ProcessGroups, *, traced: bool
    ) -> None:
        self._steps, self._work = 0, work
        self._pp_mode, self._topology, self._control = pp_mode, topology, fabric.control
        self._traced = traced
        self._tracer: Tracer = HostTracer(StepLog(lambda steps: None)) if traced else NO_TRACER
        optimizer = MixedPrecisionOptimizer(
            dict((model := _stage_model(work, topology)).named_parameters()),
            Adam(),
            dtype=DTYPES[work.precision],
            weight_decay=WEIGHT_DECAY,
            offload=False,
            sharded=False,
            replicas=fabric.replicas,
            tracer=self._tracer,
        )
        settings = _settings(work)
        agreement = _agreement(work, topology, fabric, model.indices.start)
        self._loop = Trainer(
            settings,
            topology=topology,
            control=fabric.control,
            engine=_engine(work, pp_mode, topology, fabric, model, optimizer, self._tracer),
            feed=_Feed(work, topology),  # type: ignore[arg-type]
            optimizer=optimizer,
            updater=UpdateStep(
                optimizer,
                make_scaler(
                    work.precision, constant=0, initial=1, minimum=1, window=1, hysteresis=1
                ),
                schedule=lambda update: LR,
                nominal_tokens=settings.nominal_tokens(topology.num_replicas),
                max_grad_norm=MAX_NORM,
                max_skipped=1,
            ),
            agreement=agreement,
            parameter_names=[],
            evaluation=None,
            recorder=SilentRecorder(),
            tracer=self._tracer,
            stop=StopRequest(),
            saves=_NoSaves(),
        )

    def step(self) -> float:
        self._steps += 1
        totals, _ = self._loop.advance(self._steps)
        return totals.loss / totals.tokens

    def overhead(self) -> float:
        """Measured steps over simulated ones (NaN if nothing is traced); every process calls it."""
        if not self._traced:
            return math.nan
        return engine_overhead(
            self._tracer,
            self._control,
            pp_mode=self._pp_mode,
            num_stages=self._topology.num_stages,
            num_microbatches=self._work.batch,
        )


class _Feed:
    """One batch, again and again."""

    def __init__(self, work: Work, topology: Topology) -> None:
        tokens = work.rows(topology.replica)
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        self._rows = Rows(
            tokens if topology.is_first else None, labels if topology.is_last else None
        )
        self.state: dict[str, Any] = {}

    def take(self) -> Rows:
        return self._rows


def _stage_model(work: Work, topology: Topology) -> StageModel:
    indices = stage_modules(topology.stage, work.split)
    model = StageModel(FAMILY, work.config, indices, device=CPU)
    state = work.model().state_dict()
    for index, module in zip(indices, model, strict=True):
        if index == 0:
            names = dict(FAMILY.hf_embedding)
        elif index == work.layers + 1:
            names = {**FAMILY.hf_head, "embed_out.weight": "lm_head.weight"}
        else:
            names = {k: v.format(layer=index - 1) for k, v in FAMILY.hf_block.items()}
        module.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    return model


class _NoSaves:
    """Steps are measured, not kept."""

    is_pending = is_writing = False

    def save(self, step: int, data: object, *, is_last: bool) -> bool:
        return False

    def finish(self, *, is_last: bool = False) -> bool:
        return False

    def close(self) -> None:
        """Nothing is dropped."""


def _settings(work: Work) -> LoopSettings:
    return LoopSettings(
        total_steps=2**40,
        accumulate=1,
        rows=work.batch,
        micro_rows=1,
        tokens=work.tokens,
        checkpoint_steps=0,
        evaluation_steps=0,
        seed=0,
    )


def _agreement(work: Work, topology: Topology, fabric: ProcessGroups, start: int) -> TotalsReducer:
    counts = [len(parameter_names(FAMILY, work.config, i)) for i in range(work.layers + 2)]
    return TotalsReducer(
        fabric.control, topology, norm_slots=sum(counts), first_slot=sum(counts[:start])
    )


def _engine(
    work: Work,
    pp_mode: str,
    topology: Topology,
    fabric: ProcessGroups,
    model: StageModel,
    optimizer: MixedPrecisionOptimizer,
    tracer: Tracer,
) -> Engine:
    schedule = SCHEDULES[pp_mode]
    stage = Stage(
        model,
        recompute=work.recompute,
        gradients=optimizer.flat_gradients,
        splits=splits_backward(schedule, topology.stage, topology.num_stages),
    )
    channel = StageLink(
        fabric.pipeline,
        shape=(1, work.tokens, work.hidden),
        dtype=DTYPES[work.precision],
        device=CPU,
        tracer=tracer,
    )
    return Engine(
        stage,
        channel,
        schedule=schedule,
        stage_index=topology.stage,
        num_stages=topology.num_stages,
        num_microbatches=work.batch,
        tracer=tracer,
    )
