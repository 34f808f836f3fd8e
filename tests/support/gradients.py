"""Functions that build weights of a stage for unit tests, and their gradients and optimizer."""

import torch
from torch import nn

from comm.backends.single_process import SingleProcessCommunicator
from comm.communicator import Communicator
from data_parallel.replica_gradients import ReplicaGradients
from data_parallel.zero_partition import ZeroPartition
from optimizer.adam import Adam, Algorithm
from optimizer.mixed_precision import MixedPrecisionOptimizer, MixedPrecisionWeights


def gradients_of(
    model: nn.Module, replicas: Communicator | None = None, *, sharded: bool = False
) -> ReplicaGradients:
    """Builds the gradients of `model`; without `replicas`, this process is the only replica."""
    parameters, alone = dict(model.named_parameters()), SingleProcessCommunicator()
    replicas = replicas or alone
    partition = ZeroPartition(parameters, replicas, sharded=sharded)
    return ReplicaGradients(parameters, partition, replicas)


SHAPES = {"0.weight": (5, 3), "0.bias": (5,), "1.norm.weight": (3,), "1.weight": (70, 90)}


def make_parameters(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {k: nn.Parameter(torch.randn(s, generator=generator)) for k, s in shapes.items()}


def make_optimizer(
    parameters: dict[str, nn.Parameter],
    *,
    algorithm: Algorithm | None = None,
    dtype: torch.dtype = torch.float32,
    offload: bool = False,
) -> MixedPrecisionOptimizer:
    alone = SingleProcessCommunicator()
    partition = ZeroPartition(parameters, alone, sharded=False)
    weights = MixedPrecisionWeights(parameters, partition, dtype=dtype, offload=offload)
    gradients = ReplicaGradients(parameters, partition, alone)
    return MixedPrecisionOptimizer(weights, gradients, algorithm or Adam(), weight_decay=0.1)
