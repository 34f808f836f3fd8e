"""Doubles of a communicator without peers and of a stage without a model.

The communicator records operations and completes them at once. The stage computes nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from comm.communicator import Work


class NotedWork:
    """An operation whose `wait` records that it was called, and then calls `at_wait`."""

    def __init__(self, events: list[str], what: str, at_wait: Callable[[], object]) -> None:
        self._events, self._what, self._at_wait = events, what, at_wait

    def wait(self) -> None:
        self._events.append(f"wait for {self._what}")
        self._at_wait()


class NotedCommunicator:
    """Member `rank` of `size` members; `events` lists started operations and calls of `wait`.

    Received tensors are random; the sum over the group is this member's own tensor.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.events: list[str] = []
        self.last_sent = torch.empty(0)
        self.at_receive: Callable[[], object] = lambda: None
        self.summed: list[tuple[Tensor, int | None]] = []  # with the root, if the call has one

    def send(self, tensor: Tensor, *, to: int) -> Work:
        assert tensor.is_contiguous()
        self.last_sent = tensor
        return self._begin(f"send to {to}", lambda: None)

    def receive(self, tensor: Tensor, *, source: int) -> Work:
        def arrive() -> None:
            self.at_receive()
            tensor.normal_()

        return self._begin(f"receive from {source}", arrive)

    def all_reduce(self, tensor: Tensor) -> Work:
        self.summed.append((tensor, None))
        return self._begin("all-reduce", lambda: None)

    def reduce(self, tensor: Tensor, *, root: int) -> Work:
        self.summed.append((tensor, root))
        return self._begin(f"reduce to {root}", lambda: None)

    def broadcast(self, tensor: Tensor, *, root: int) -> None:
        raise AssertionError("no test calls this")

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor] * self.size)

    def close(self) -> None:
        """Does nothing, because there are no resources."""

    def _begin(self, what: str, at_wait: Callable[[], object]) -> Work:
        self.events.append(what)
        return NotedWork(self.events, what, at_wait)


class IdleStage:
    """A stage that computes nothing; it adds `compute` to `events` for each action.

    `shape` is the shape of the activations and gradients that it returns.
    """

    in_flight: frozenset[int] = frozenset()

    def __init__(self, shape: tuple[int, ...], events: list[str] | None = None) -> None:
        self._shape, self._events = shape, [] if events is None else events

    def forward(self, microbatch: int, x: Tensor, *args: object, **options: object) -> Tensor:
        return self._compute()

    def evaluate(self, x: Tensor, labels: Tensor | None, **options: object) -> Tensor:
        return self._compute()

    def backward(self, microbatch: int, gradient: Tensor | None) -> Tensor:
        return self._compute()

    def weight_gradient(self, microbatch: int) -> None:
        self._compute()

    def _compute(self) -> Tensor:
        self._events.append("compute")
        return torch.zeros(self._shape)
