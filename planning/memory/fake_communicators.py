"""Communicators of a dry run: they send nothing, and keep tensors as long as real ones do."""

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
        """Returns at once."""


class _WithoutPeers:
    """The part that all have in common."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns no member's tensor: fake tensors have no values to compare."""
        return tensor.new_empty((0, *tensor.shape))

    def close(self) -> None:
        """Does nothing: there is no group."""


class FakeSingleProcess(_WithoutPeers, SingleProcessCommunicator):
    """The group of one."""


class FakeGloo(_WithoutPeers, GlooCommunicator):
    """gloo's communicator without messages; it sums in the order of the members."""

    def __init__(self, group: Group) -> None:
        torch_group: Any = None  # never asked
        super().__init__(torch_group, group)

    def _start(self, what: str, tensor: Tensor, post: Post) -> Work:
        return _FinishedWork(post)


class FakeNccl(_WithoutPeers, GroupMembership):
    """A communicator that sums in place, in a library whose buffers are not torch's."""

    def send(self, tensor: Tensor, *, to: int) -> Work:
        return _FinishedWork(tensor)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        return _FinishedWork(tensor)

    def all_reduce(self, tensor: Tensor) -> Work:
        return Done()

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        return Done()

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        """Does nothing."""
