"""What every channel between processes can do, whichever library moves the bytes."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class PeerLostError(RuntimeError):
    """An operation ended because a peer died, hung or could not be reached; the text names it."""


class Work(Protocol):
    """An operation under way. Its tensor must stay untouched until `wait` returns."""

    def wait(self) -> None:
        """Returns when the tensor may be read and written; raises PeerLostError."""


class Communicator(Protocol):
    """A group of processes, addressed by their index in it (not by global rank).

    Messages between two members arrive in the order in which they were sent. Every tensor is
    contiguous, on the backend's device. All operations raise PeerLostError, which names the
    operation, the peers by global rank and how long it waited.
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
        """Starts receiving into `tensor` what member `source` sends."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Sums `tensor` over the members in place, adding in the order of the members on CPU."""

    def reduce(self, tensor: Tensor, *, root: int) -> None:
        """As `all_reduce`, to the same bits, but only member `root` gets the sum."""

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        """Fills `tensor` on every member with that of member `root`."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The members' tensors, stacked: (size, *tensor.shape)."""

    def close(self) -> None:
        """Releases what the group holds; it cannot be used again."""
