"""The gradients of a stage: their buffer, and their exchange between the replicas."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from comm.communicator import Communicator
from data_parallel.broadcast import broadcast_owned
from data_parallel.grad_buffer import GradBuffer
from data_parallel.modes import load_dp_mode
from data_parallel.zero_partition import ZeroPartition
from monitor.profiling.tracer import NO_TRACER, Tracer


class ReplicaGradients:
    """The gradients of a stage's weights; --dp-mode sets how the replicas exchange them.

    Backward adds the gradients to `buffer`, and the optimizer reads them there.

    Args:
        parameters: the stage's weights by name, already in the compute type.
        partition: the replicas that update each weight.
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
        """Begins an update: `num_microbatches` microbatches add to `buffer`, which must be zero."""
        self.buffer.expect(num_microbatches)

    def finish_exchange(self) -> None:
        """Waits until the gradients of all buckets are exchanged.

        Afterwards a replica has the exchanged gradients of the weights that it updates.
        """
        self.buffer.check_complete()
        self.exchange.finish()

    def reported(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the name and exchanged gradient of each weight whose owner is this process.

        Each weight has one owner, so the replicas together yield each gradient once.
        """
        for name in self.partition.names:
            if self.partition.owner(name) == self._replicas.rank:
                yield name, self.buffer.views[name]

    def after_update(self) -> None:
        """Calls the dp mode's `after_update`, which must run after each update of the weights."""
        self.exchange.after_update()

    def share_weights(self) -> None:
        """Broadcasts loaded weights from their owners to all replicas, if ZeRO is on."""
        if self.partition.sharded and self._replicas.size > 1:
            broadcast_owned(self._parameters, self.partition, self._replicas)
