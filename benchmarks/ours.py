"""Our side of a comparison: the training loop, with a data loader that repeats one batch."""

import math
from typing import Any

import torch

from arguments.settings import UpdateSettings
from benchmarks.overhead import engine_overhead
from benchmarks.work import CPU, LR, MAX_NORM, WEIGHT_DECAY, Workload
from comm.lifecycle.stop_signals import StopRequest
from comm.process_groups import ProcessGroups
from comm.run_context import RunContext
from comm.topology import Topology
from common.tensors import DTYPES
from modules.registry import MODELS
from modules.stage_model import StageModel
from monitor.profiling.tracer import NO_TRACER, HostTracer, StepLog, Tracer
from optimizer.adam import Adam
from optimizer.build import build_optimizer
from optimizer.loss_scaler import make_scaler
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.update import UpdateStep
from pipeline_parallel.batch_scatter import Rows
from pipeline_parallel.build import build_engine
from pipeline_parallel.engine import Engine
from pipeline_parallel.p2p import MessageSpec, StageLink
from pipeline_parallel.partition.split import stage_modules
from training.iteration import Iteration
from training.not_finite import NotFiniteReport
from training.step_totals import TotalsReducer, names_by_stage


class Ours:
    """One stage of our pipeline with the schedule `pp_mode`.

    traced: whether steps are traced, as with --profiling.
    """

    def __init__(
        self,
        work: Workload,
        pp_mode: str,
        topology: Topology,
        groups: ProcessGroups,
        *,
        traced: bool,
        device: torch.device = CPU,
    ) -> None:
        self._steps, self._work = 0, work
        self._pp_mode, self._topology, self._control = pp_mode, topology, groups.control
        self._traced = traced
        self._tracer: Tracer = HostTracer(StepLog(lambda steps: None)) if traced else NO_TRACER
        context = RunContext(topology, groups, device, start="")
        settings = _settings(work)
        model = _stage_model(work, topology, device)
        optimizer = build_optimizer(
            model,
            Adam(),
            precision=work.precision,
            weight_decay=WEIGHT_DECAY,
            offload=False,
            zero_stage=0,
            replicas=groups.replicas,
            tracer=self._tracer,
        )
        engine = _engine(work, pp_mode, context, model, optimizer, self._tracer)
        feed: Any = _RepeatedRows(work, topology, device)
        scaler = make_scaler(
            work.precision, constant=0, initial=1, minimum=1, window=1, hysteresis=1
        )
        update_step = UpdateStep(
            optimizer,
            scaler,
            schedule=lambda update: LR,
            nominal_tokens=settings.nominal_tokens(topology.num_replicas),
            max_grad_norm=MAX_NORM,
            max_skipped=1,
        )
        names = names_by_stage(MODELS[work.family].load(), work.config, work.split)
        self._iteration = Iteration(
            settings,
            context,
            engine=engine,
            feed=feed,
            update_step=update_step,
            totals=TotalsReducer(
                groups.control,
                topology,
                num_parameters=[len(of_stage) for of_stage in names],
                tracer=self._tracer,
            ),
            report=NotFiniteReport(settings, context, engine=engine, feed=feed, parameter_names=[]),
            stop=StopRequest(),
        )

    def step(self) -> float:
        self._steps += 1
        totals, _ = self._iteration.advance(self._steps)
        return totals.loss / totals.tokens

    def overhead(self) -> float:
        """Returns measured / simulated step time (NaN if not traced); all ranks must call it."""
        if not self._traced:
            return math.nan
        return engine_overhead(
            self._tracer,
            self._control,
            pp_mode=self._pp_mode,
            num_stages=self._topology.num_stages,
            num_microbatches=self._work.num_microbatches,
        )


class _RepeatedRows:
    """Data loader that returns the same batch each time."""

    def __init__(self, work: Workload, topology: Topology, device: torch.device) -> None:
        tokens = work.rows(topology.replica).to(device)
        labels = torch.full_like(tokens, -100)
        labels[:, :-1] = tokens[:, 1:]
        self._rows = Rows(
            tokens if topology.is_first else None, labels if topology.is_last else None
        )
        self.state: dict[str, Any] = {}

    def next(self) -> Rows:
        return self._rows


def _stage_model(work: Workload, topology: Topology, device: torch.device) -> StageModel:
    family, indices = MODELS[work.family].load(), stage_modules(topology.stage, work.split)
    model = StageModel(family, work.config, indices, device=device)
    state = work.model(device).state_dict()
    for attribute, name in family.hf_aliases.items():  # files and attributes have other names
        state[name] = state[attribute]
    for index, module in zip(indices, model, strict=True):
        if index == 0:
            names = dict(family.hf_embedding)
        elif index == work.layers + 1:
            names = dict(family.hf_head)
        else:
            names = {k: v.format(layer=index - 1) for k, v in family.hf_block.items()}
        module.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
    return model


def _settings(work: Workload) -> UpdateSettings:
    return UpdateSettings(
        total_steps=2**40,
        lr=LR,
        warmup_steps=0,
        lr_schedule="constant",
        min_lr=0.0,
        optimizer="adam",
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_NORM,
        seq_length=work.tokens,
        batch_size=work.batch,
        micro_batch_size=work.micro_batch,
        gradient_accumulate_step=1,
        seed=0,
    )


def _engine(
    work: Workload,
    pp_mode: str,
    context: RunContext,
    model: StageModel,
    optimizer: MixedPrecisionOptimizer,
    tracer: Tracer,
) -> Engine:
    spec = MessageSpec(
        (work.micro_batch, work.tokens, work.hidden), DTYPES[work.precision], context.device
    )
    return build_engine(
        model,
        StageLink(context.groups.pipeline, spec, tracer=tracer),
        gradients=optimizer.gradients.buffer,
        schedule=pp_mode,
        recompute=work.recompute,
        num_microbatches=work.num_microbatches,
        tracer=tracer,
    )
