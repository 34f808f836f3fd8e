"""The communicator of a group of one process: it sends nothing and opens no socket."""

from typing import NoReturn

from torch import Tensor

from comm.communicator import Done, Work


class SingleProcessCommunicator:
    """A Communicator whose only member is this process."""

    @property
    def rank(self) -> int:
        return 0

    @property
    def size(self) -> int:
        return 1

    def send(self, tensor: Tensor, *, to: int) -> Work:
        self._no_peer(to)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        self._no_peer(source)

    def all_reduce(self, tensor: Tensor) -> Work:
        """Leaves `tensor` unchanged, because it already is the sum over one member."""
        return Done()

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        assert root == 0
        return Done()

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        assert root == 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0).clone()

    def close(self) -> None:
        """Does nothing, because there is no resource to release."""

    def _no_peer(self, peer: int) -> NoReturn:
        raise AssertionError(f"a group of one process has no member {peer}")
