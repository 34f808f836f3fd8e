"""Channels that reach nobody: what they would send and receive is held as long as in earnest.

For finding out what a process of a run holds, without the others.
"""

from typing import Any

from torch import Tensor

from comm.backends.base import Group, GroupMembership, Post
from comm.backends.gloo import GlooCommunicator
from comm.backends.single_process import SingleProcessCommunicator
from comm.communicator import Done, Work


class _FinishedWork:
    """An operation that has ended; it keeps its tensors alive until it is dropped."""

    def __init__(self, tensors: object) -> None:
        self._tensors = tensors

    def wait(self) -> None:
        """Nothing travels."""


def _no_rows(tensor: Tensor) -> Tensor:
    """What is gathered where nobody answers, whose values nobody can ask for either."""
    return tensor.new_empty((0, *tensor.shape))


class FakeSingleProcess(SingleProcessCommunicator):
    """The group of one."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        return _no_rows(tensor)


class FakeGloo(GlooCommunicator):
    """gloo's communicator, sums in the order of the members included, without a message."""

    def __init__(self, group: Group) -> None:
        torch_group: Any = None  # never asked
        super().__init__(torch_group, group)

    def _start(self, what: str, tensor: Tensor, post: Post) -> Work:
        return _FinishedWork(post)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return _no_rows(tensor)

    def close(self) -> None:
        """There is no group."""


class FakeNccl(GroupMembership):
    """A communicator that sums in place, in libraries whose buffers are not torch's."""

    def send(self, tensor: Tensor, *, to: int) -> Work:
        return _FinishedWork(tensor)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return _FinishedWork(tensor)

    def all_reduce(self, tensor: Tensor) -> Work:
        return Done()

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        return Done()

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        """Nothing travels."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        return _no_rows(tensor)

    def close(self) -> None:
        """There is no group."""
