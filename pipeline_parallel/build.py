"""Construction of the pipeline engine of a stage."""

from modules.layers.linear import WeightGradBuffer
from modules.layers.selective import Recompute
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
    recompute: Recompute,
    num_microbatches: int,
    tracer: Tracer,
    kind: type[Engine] = Engine,
) -> Engine:
    """Returns the engine of a stage; `schedule` and `num_microbatches` must be equal on all stages.

    Args:
        model: the stage's part of the model.
        link: the connection with the neighbouring stages.
        gradients: the buffer to which backward adds the gradients of large weights.
        schedule: a key of `SCHEDULES`.
        recompute: which activations backward computes again.
        num_microbatches: the number of microbatches in a pipeline's batch.
        tracer: records how long actions take.
        kind: the class of the engine.
    """
    actions = SCHEDULES[schedule]
    splits = splits_backward(actions, link.stage, link.num_stages)
    stage = Stage(model, recompute=recompute, gradients=gradients, splits=splits)
    return kind(stage, link, schedule=actions, num_microbatches=num_microbatches, tracer=tracer)
