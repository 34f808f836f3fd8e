"""Communicators of a dry run: they send nothing, but keep tensors alive as real ones do."""

from typing import Any

from torch import Tensor

from comm.backends.base import Group, GroupMembership, Post
from comm.backends.gloo import GlooCommunicator
from comm.communicator import Done, Work


class _FinishedWork:
    """A complete operation of a communicator; the object keeps the operation's tensors alive."""

    def __init__(self, tensors: object) -> None:
        self._tensors = tensors

    def wait(self) -> None:
        """Returns at once."""


class _WithoutResources:
    """The method that all fake communicators share."""

    def close(self) -> None:
        """Does nothing, because there is no process group."""


class FakeGloo(_WithoutResources, GlooCommunicator):
    """A gloo communicator without messages; its all-reduce allocates tensors as gloo's does."""

    def __init__(self, group: Group) -> None:
        torch_group: Any = None  # never used
        super().__init__(torch_group, group)

    def _start(self, what: str, tensor: Tensor, post: Post) -> Work:
        return _FinishedWork(post)


class FakeNccl(_WithoutResources, GroupMembership):
    """An NCCL communicator without messages; as in NCCL, sums allocate no torch tensors."""

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

    def all_gather(self, tensor: Tensor) -> Tensor:
        raise AssertionError("a dry run gathers no tensors")
