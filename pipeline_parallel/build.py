"""Builds the pipeline engine of a stage."""

from __future__ import annotations

from comm.topology import Topology
from modules.layers.linear import WeightGradBuffer
from modules.stage_model import StageModel
from monitor.profiling.tracer import Tracer
from pipeline_parallel.engine import Engine
from pipeline_parallel.p2p import StageLink
from pipeline_parallel.schedule.schedules import SCHEDULES, splits_backward
from pipeline_parallel.stage import Stage


def build_engine(
    model: StageModel,
    link: StageLink,
    *,
    topology: Topology,
    gradients: WeightGradBuffer,
    schedule: str,
    recompute: bool,
    num_microbatches: int,
    tracer: Tracer,
    kind: type[Engine] = Engine,
) -> Engine:
    """Builds the engine of a stage; every stage calls it alike."""
    actions = SCHEDULES[schedule]
    stage = Stage(
        model,
        recompute=recompute,
        gradients=gradients,
        splits=splits_backward(actions, topology.stage, topology.num_stages),
    )
    return kind(
        stage,
        link,
        schedule=actions,
        stage_index=topology.stage,
        num_stages=topology.num_stages,
        num_microbatches=num_microbatches,
        tracer=tracer,
    )
