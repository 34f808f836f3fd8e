"""Builds the optimizer of a stage, and tells how large its checkpoint is."""

from __future__ import annotations

import torch

from comm.communicator import Communicator
from common.tensors import DTYPES
from modules.stage_model import StageModel
from monitor.profiling.tracer import Tracer
from optimizer.adam import Adam
from optimizer.adam_8bit import Adam8bit
from optimizer.mixed_precision import Algorithm, MixedPrecisionOptimizer

ALGORITHMS: dict[str, type[Algorithm]] = {"adam": Adam, "8bit-adam": Adam8bit}
MOMENT_BYTES = {"adam": 8.0, "8bit-adam": 2.1}  # of one parameter


def build_optimizer(
    model: StageModel,
    algorithm: Algorithm,
    *,
    precision: str,
    weight_decay: float,
    offload: bool,
    zero_stage: int,
    replicas: Communicator,
    tracer: Tracer,
) -> MixedPrecisionOptimizer:
    """Builds the optimizer of a model in fp32, and casts its weights to the compute type."""
    return MixedPrecisionOptimizer(
        dict(model.named_parameters()),
        algorithm,
        dtype=DTYPES[precision],
        weight_decay=weight_decay,
        offload=offload,
        sharded=zero_stage == 1,
        replicas=replicas,
        tracer=tracer,
    )


def checkpoint_bytes(num_parameters: int, *, precision: str, optimizer: str) -> tuple[int, int]:
    """Returns the bytes of a checkpoint: of the weights, and of masters and moments."""
    dtype = DTYPES[precision]
    masters = 0 if dtype == torch.float32 else 4
    state = num_parameters * (masters + MOMENT_BYTES[optimizer])
    return num_parameters * dtype.itemsize, int(state)
