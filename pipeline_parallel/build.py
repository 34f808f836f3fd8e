"""Builds the pipeline engine of a stage."""

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
    gradients: WeightGradBuffer,
    schedule: str,
    recompute: bool,
    num_microbatches: int,
    tracer: Tracer,
    kind: type[Engine] = Engine,
) -> Engine:
    """Builds the engine of a stage; every stage calls it with the same numbers.

    Args:
        model: the stage's part of the model.
        link: its neighbours.
        gradients: the buffer to which backward adds the gradients of large weights.
        schedule: one of `SCHEDULES`.
        recompute: backward computes the activations again.
        num_microbatches: of a pipeline's batch.
        tracer: records how long actions take.
        kind: the class of the engine.
    """
    actions = SCHEDULES[schedule]
    splits = splits_backward(actions, link.stage, link.num_stages)
    stage = Stage(model, recompute=recompute, gradients=gradients, splits=splits)
    return kind(stage, link, schedule=actions, num_microbatches=num_microbatches, tracer=tracer)
