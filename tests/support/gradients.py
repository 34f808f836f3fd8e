"""The gradients of a module, as a stage has them."""

from torch import nn

from comm.backends.single_process import SingleProcessCommunicator
from comm.communicator import Communicator
from data_parallel.replica_gradients import ReplicaGradients
from data_parallel.zero_partition import ZeroPartition


def gradients_of(
    model: nn.Module, replicas: Communicator | None = None, *, sharded: bool = False
) -> ReplicaGradients:
    """Builds the gradients of `model`, without other replicas where none are given."""
    parameters, alone = dict(model.named_parameters()), SingleProcessCommunicator()
    replicas = replicas or alone
    partition = ZeroPartition(parameters, replicas, sharded=sharded)
    return ReplicaGradients(parameters, partition, replicas)
