"""The interface of all communication between processes; comm/backends implements it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class PeerLostError(RuntimeError):
    """The error of an operation whose peer died, hung or was unreachable; it names the peer."""


class Work(Protocol):
    """A running operation; its tensor must not be read or written until `wait` returns.

    Every Work must be waited for; otherwise the operation may never complete on any rank.
    """

    def wait(self) -> None:
        """Waits until the tensor may be read and written; can raise PeerLostError. Call it once."""


class Done:
    """The Work of an operation that is complete from the start, because it sends no message."""

    def wait(self) -> None:
        """Returns at once."""


class PointToPoint(Protocol):
    """Messages between the members of a group; a member's address is its index in the group.

    Messages between two members arrive in the order in which they were sent.
    """

    @property
    def rank(self) -> int:
        """This process's index in the group."""

    @property
    def size(self) -> int:
        """The number of members."""

    def send(self, tensor: Tensor, *, to: int) -> Work:
        """Starts sending `tensor` to member `to`."""

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        """Starts receiving a message from member `source` into `tensor`."""


class Communicator(PointToPoint, Protocol):
    """A group of processes; a member's address is its index in the group, not its global rank.

    A send does not wait for its receiver, and several operations may run at once. Every tensor is
    contiguous and on the backend's device. Every operation can raise PeerLostError, which names the
    operation, the global ranks of the peers and the seconds waited.

    All members must start the collective operations (all except send and receive) in the same
    order.
    """

    def all_reduce(self, tensor: Tensor) -> Work:
        """Starts summing `tensor` in place over the members; on CPU, in order of their indices."""

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """Starts summing `tensor` over the members; only member `root` gets the sum.

        On CPU the sum has the same bits as the sum of `all_reduce`. On the other members the values
        of `tensor` are undefined afterwards.
        """

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        """Copies the tensor of member `root` into `tensor` on every member."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all members, stacked: (size, *tensor.shape)."""

    def close(self) -> None:
        """Releases the group's resources; the group cannot be used again."""


class CurrentOperation:
    """The name of the operation that this process waits for.

    The error about a lost rank quotes the name. While one thread waits, another thread can write
    this error.
    """

    def __init__(self) -> None:
        self.text = "start"

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Sets the name to `text` in the `with` block; if the block fails, `text` stays set."""
        before, self.text = self.text, text
        yield
        self.text = before
