"""The interface of all communication between processes, whichever library moves the bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor


class PeerLostError(RuntimeError):
    """An operation failed because a peer died, hung or could not be reached; the text names it."""


class Work(Protocol):
    """An operation under way. Its tensor must stay untouched until `wait` returns.

    Every Work must be waited for; otherwise the operation may never complete on any rank.
    """

    def wait(self) -> None:
        """Returns when the tensor may be read and written; raises PeerLostError. Called once."""


class Done:
    """The Work of an operation that is complete from the start: it sends no message."""

    def wait(self) -> None:
        """Returns at once."""


class PointToPoint(Protocol):
    """Messages between the members of a group, which are addressed by their index in it.

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
        """Starts receiving a message of member `source` into `tensor`."""


class Communicator(PointToPoint, Protocol):
    """A group of processes, addressed by their index in it (not by global rank).

    A send does not wait for its receiver, and several operations may be under way. Every tensor is
    contiguous, on the backend's device. All operations raise PeerLostError, which names the
    operation, the peers by global rank and how long it waited.

    Operations of the whole group (all but send and receive) are started in the same order by all
    its members.
    """

    def all_reduce(self, tensor: Tensor) -> Work:
        """Starts summing `tensor` over the members in place, in their order on CPU."""

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        """As `all_reduce`, to the same bits on CPU, but only member `root` gets the sum.

        The values of the tensor are undefined on the others afterwards.
        """

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        """Copies member `root`'s tensor into `tensor` on every member."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Returns the members' tensors, stacked: (size, *tensor.shape)."""

    def close(self) -> None:
        """Releases the group's resources; it cannot be used again."""


class CurrentOperation:
    """The name of the operation that this process waits for, reported when a rank is lost.

    Cheap to set; read by another thread.
    """

    def __init__(self) -> None:
        self.text = "start"

    @contextmanager
    def during(self, text: str) -> Iterator[None]:
        """Sets `text` for a block; after an error it stays, to be reported."""
        before, self.text = self.text, text
        yield
        self.text = before
