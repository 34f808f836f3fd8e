"""Broadcasts of many tensors between replicas, in messages of limited size."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from comm.communicator import Communicator
from data_parallel.grad_buffer import BUCKET_BYTES
from data_parallel.zero_partition import ZeroPartition


@torch.no_grad()
def broadcast_bucketed(
    tensors: Sequence[Tensor], replicas: Communicator, *, root: int, bucket_bytes: int
) -> None:
    """Copies the values of `tensors` on replica `root` to the same tensors on every replica.

    Args:
        tensors: contiguous tensors of one type; the shapes are the same on all replicas.
        replicas: the processes that take part.
        root: the replica that sends.
        bucket_bytes: the size limit of a message that joins several tensors. A larger tensor is
            sent as a message of its own, without a copy.
    """
    for bucket in _buckets(tensors, bucket_bytes):
        if len(bucket) == 1:
            replicas.broadcast(bucket[0], root=root)
            continue
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        replicas.broadcast(flat, root=root)
        if replicas.rank != root:
            parts = torch.split(flat, [tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[Tensor], bucket_bytes: int) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.nbytes for t in [*bucket, tensor]) > bucket_bytes:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def broadcast_owned(
    parameters: Mapping[str, nn.Parameter], partition: ZeroPartition, replicas: Communicator
) -> None:
    """Copies every weight from the replica that owns it to all replicas, one owner at a time."""
    for owner in range(replicas.size):
        names = [name for name in partition.names if partition.owner(name) == owner]
        weights = [parameters[name].data for name in names]
        broadcast_bucketed(weights, replicas, root=owner, bucket_bytes=BUCKET_BYTES)


def same_on_all(tensors: Iterable[Tensor], replicas: Communicator) -> bool:
    """Returns whether `tensors` are equal on all replicas; compares a checksum of each tensor."""
    sums = [t.contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors]
    gathered = replicas.all_gather(torch.stack(sums))
    return bool((gathered == gathered[0]).all())
