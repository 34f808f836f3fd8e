"""The pipeline of a run: its engine, and what its stages agree on after each iteration."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from arguments.settings import LoopSettings
from comm.communicator import Communicator
from comm.topology import Topology
from modules.build import parameter_names
from modules.families.base import Family
from modules.layers.linear import GradientSink
from modules.stage_model import StageModel, stage_modules
from monitor.profiling.tracer import Tracer
from optimizer.clipping import Agreement
from optimizer.mixed_precision import DTYPES
from pipeline_parallel.engine import Engine
from pipeline_parallel.p2p import PipelineChannel
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.stage import Stage


def loop_settings(args: argparse.Namespace) -> LoopSettings:
    """The numbers of the run, from its flags."""
    return LoopSettings(
        total_steps=args.total_steps,
        accumulate=args.gradient_accumulate_step,
        rows=args.batch_size,
        micro_rows=args.micro_batch_size,
        tokens=args.seq_length,
        checkpoint_steps=args.checkpoint_steps,
        evaluation_steps=args.evaluation_steps,
        seed=args.seed,
    )


def build_engine(
    args: argparse.Namespace,
    model: StageModel,
    *,
    topology: Topology,
    pipeline: Communicator,
    gradients: GradientSink,
    hidden_size: int,
    device: torch.device,
    tracer: Tracer,
    kind: type[Engine] = Engine,
    num_microbatches: int | None = None,
) -> Engine:
    """Every stage calls it; ValueError where neighbours would send each other different things.

    `num_microbatches` are those of the flags where it is None.
    """
    settings, schedule = loop_settings(args), SCHEDULES[args.pp_mode]
    return kind(
        Stage(
            model,
            recompute=args.recompute,
            gradients=gradients,
            splits=splits_backward(schedule, topology.stage, topology.num_stages),
        ),
        PipelineChannel(
            pipeline,
            shape=(settings.micro_rows, settings.tokens, hidden_size),
            dtype=DTYPES[args.precision],
            device=device,
            tracer=tracer,
        ),
        schedule=schedule,
        stage_index=topology.stage,
        num_stages=topology.num_stages,
        num_microbatches=num_microbatches or settings.num_microbatches,
        tracer=tracer,
    )


def names_by_stage(family: Family, config: Any, split: Sequence[int]) -> list[list[str]]:
    """The parameters of each stage, in the order of the layers."""
    return [
        [
            f"stage {stage}, {name}"
            for index in stage_modules(stage, split)
            for name in parameter_names(family, config, index)
        ]
        for stage in range(len(split))
    ]


def build_agreement(
    names: Sequence[Sequence[str]], control: Communicator, topology: Topology, tracer: Tracer
) -> Agreement:
    """`names` are those of `names_by_stage`."""
    counts = [len(of_stage) for of_stage in names]
    return Agreement(
        control,
        topology,
        norm_slots=sum(counts),
        first_slot=sum(counts[: topology.stage]),
        tracer=tracer,
    )
