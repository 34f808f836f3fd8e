"""Communication of CUDA tensors through copies in host memory: slow, but it needs only TCP."""

from dataclasses import dataclass

import torch
from torch import Tensor

from comm.communicator import Communicator, Work


class HostStagingCommunicator:
    """A Communicator for device tensors; `host` is a Communicator for host tensors."""

    def __init__(self, host: Communicator) -> None:
        self._host = host

    @property
    def rank(self) -> int:
        return self._host.rank

    @property
    def size(self) -> int:
        return self._host.size

    def send(self, tensor: Tensor, *, to: int) -> Work:
        copy = _to_host(tensor)
        return _CopyWork(self._host.send(copy, to=to), copy, None)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        copy = torch.empty_like(tensor, device="cpu")
        return _CopyWork(self._host.receive(copy, source=source), copy, tensor)

    def all_reduce(self, tensor: Tensor) -> Work:
        copy = _to_host(tensor)
        return _CopyWork(self._host.all_reduce(copy), copy, tensor)

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        copy = _to_host(tensor)
        target = tensor if self.rank == root else None
        return _CopyWork(self._host.reduce(copy, root=root), copy, target)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        copy = _to_host(tensor)
        self._host.broadcast(copy, root=root)
        tensor.copy_(copy)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._host.all_gather(_to_host(tensor)).to(tensor.device)

    def close(self) -> None:
        self._host.close()


@dataclass(frozen=True)
class _CopyWork:
    """The Work of an operation on a host copy; `wait` also copies the result to `target`.

    `target` is the tensor on the device; it is None if this process receives no result.
    """

    work: Work
    copy: Tensor
    target: Tensor | None

    def wait(self) -> None:
        self.work.wait()
        if self.target is not None:
            self.target.copy_(self.copy)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
