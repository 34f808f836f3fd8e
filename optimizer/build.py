"""Construction of a stage's optimizer, and the size of the optimizer's state in a checkpoint."""

import torch
from torch import nn

from comm.communicator import Communicator
from common.tensors import DTYPES
from data_parallel.replica_gradients import ReplicaGradients
from data_parallel.zero_partition import ZeroPartition
from monitor.profiling.tracer import NO_TRACER, Tracer
from optimizer.adam import Adam, Algorithm
from optimizer.adam_8bit import Adam8bit
from optimizer.mixed_precision import MixedPrecisionOptimizer, MixedPrecisionWeights

ALGORITHMS: dict[str, type[Algorithm]] = {"adam": Adam, "8bit-adam": Adam8bit}
MOMENT_BYTES = {"adam": 8.0, "8bit-adam": 2.1}  # of one parameter


def build_optimizer(
    model: nn.Module,
    algorithm: Algorithm,
    *,
    precision: str,
    weight_decay: float,
    offload: bool = False,
    zero_stage: int = 0,
    dp_mode: str = "allreduce",
    replicas: Communicator,
    tracer: Tracer = NO_TRACER,
) -> MixedPrecisionOptimizer:
    """Returns a stage's optimizer; the optimizer owns the buffer to which backward adds gradients.

    The function first casts the weights to the compute type (compute copies) and then makes the
    buffer, because the buffer handles fp32 and half-precision weights in different ways.

    Args:
        model: the stage, in fp32; its weights become the compute copies.
        algorithm: an instance of a class in `ALGORITHMS`.
        precision: the type of the compute copies, a key of `common.tensors.DTYPES`.
        weight_decay: the weight decay of matrices; it is 0 for biases and norms.
        offload: whether masters and moments are in host memory.
        zero_stage: 0: every replica updates every weight. 1: for each weight, one replica
            updates the weight and sends it to the others.
        dp_mode: a key of `data_parallel.modes.DP_MODES`.
        replicas: the processes that train this stage.
        tracer: records how long updates and communication take.
    """
    parameters = dict(model.named_parameters())
    partition = ZeroPartition(parameters, replicas, sharded=zero_stage == 1)
    weights = MixedPrecisionWeights(parameters, partition, dtype=DTYPES[precision], offload=offload)
    gradients = ReplicaGradients(parameters, partition, replicas, mode=dp_mode, tracer=tracer)
    return MixedPrecisionOptimizer(
        weights, gradients, algorithm, weight_decay=weight_decay, tracer=tracer
    )


def checkpoint_bytes(num_parameters: int, *, precision: str, optimizer: str) -> tuple[int, int]:
    """Returns the bytes of the weights in a checkpoint, and the bytes of masters and moments."""
    dtype = DTYPES[precision]
    masters = 0 if dtype == torch.float32 else 4
    state = num_parameters * (masters + MOMENT_BYTES[optimizer])
    return num_parameters * dtype.itemsize, int(state)
