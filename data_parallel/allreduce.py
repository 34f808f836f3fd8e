"""The dp mode allreduce: replicas sum gradients while backward computes further gradients."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from comm.communicator import Communicator, Work
from data_parallel.broadcast import broadcast_owned
from data_parallel.grad_buffer import Bucket
from data_parallel.zero_partition import ZeroPartition
from monitor.profiling.tracer import Tracer, Track


class AllReduce:
    """All-reduce of each bucket: every replica gets the sum of the replicas' gradients.

    With ZeRO only the owner of a bucket gets the sum. The owner updates the weights of the bucket,
    and broadcasts them after the update.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        partition: ZeroPartition,
        replicas: Communicator,
        tracer: Tracer,
    ) -> None:
        self._parameters, self._partition = parameters, partition
        self._replicas, self._tracer = replicas, tracer
        self._works: list[Work] = []

    def bucket_ready(self, bucket: Bucket) -> None:
        """Starts to sum the gradients of a bucket over the replicas."""
        if self._partition.sharded:
            work = self._replicas.reduce(bucket.gradients, root=bucket.owner)
        else:
            work = self._replicas.all_reduce(bucket.gradients)
        self._works.append(work)

    def finish(self) -> None:
        """Waits until the sums of all buckets are complete."""
        with self._tracer.span(Track.OPTIMIZER_COMM, size=self._partition.num_elements):
            for work in self._works:
                work.wait()
        self._works.clear()

    def after_update(self) -> None:
        """Broadcasts the updated weights from their owners to all replicas, if ZeRO is on."""
        if self._partition.sharded and self._replicas.size > 1:
            with self._tracer.span(Track.OPTIMIZER_COMM, size=self._partition.num_elements):
                broadcast_owned(self._parameters, self._partition, self._replicas)

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty state, because an all-reduce needs nothing from earlier updates."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing, because an all-reduce has no state."""
        assert not state, "an all-reduce has no state"
