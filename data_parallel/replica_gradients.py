"""The owner of a stage's gradients: their buffer, their readiness and their exchange."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from comm.communicator import Communicator
from data_parallel.broadcast import broadcast_owned
from data_parallel.grad_buffer import GradBuffer
from data_parallel.modes import load_dp_mode
from data_parallel.zero_partition import ZeroPartition
from monitor.profiling.tracer import NO_TRACER, Tracer


class ReplicaGradients:
    """The gradients of a stage's weights, which its replicas exchange as the --dp-mode says.

    Backward adds to `buffer`, the optimizer reads its views.

    Args:
        parameters: the stage's weights by name, already in the type of their compute copies.
        partition: the replicas that step each weight.
        replicas: the processes that train this stage.
        mode: the value of --dp-mode.
        tracer: records how long communication takes.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        partition: ZeroPartition,
        replicas: Communicator,
        *,
        mode: str = "allreduce",
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self._parameters, self._replicas, self.partition = parameters, replicas, partition
        self.exchange = load_dp_mode(mode)(parameters, partition, replicas, tracer)
        self.buffer = GradBuffer(parameters, partition, self.exchange.bucket_ready)

    def begin_update(self, num_microbatches: int) -> None:
        """Begins an update of so many microbatches, whose gradients are zero so far."""
        self.buffer.expect(num_microbatches)

    def finish_exchange(self) -> None:
        """Waits until the gradients are exchanged, on the replicas that step with them."""
        self.buffer.check_complete()
        self.exchange.finish()

    def reported(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the exchanged gradients that this process reports; each has one that does."""
        for name in self.partition.names:
            if self.partition.owner(name) == self._replicas.rank:
                yield name, self.buffer.views[name]

    def after_update(self) -> None:
        """Runs what the mode does after an update of the weights."""
        self.exchange.after_update()

    def share_weights(self) -> None:
        """Gives every replica the weights that only another replica steps and has loaded."""
        if self.partition.sharded and self._replicas.size > 1:
            broadcast_owned(self._parameters, self.partition, self._replicas)
