"""All gradients of a stage in one fp32 buffer, which replicas sum bucket by bucket.

Backward adds into the buffer. A bucket whose gradients are all there is summed over the replicas
while backward goes on with the others; buckets start in one order on all replicas, the reverse of
the layers'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from comm.communicator import Communicator, Work
from modules.layers.linear import Deferred
from modules.matmul.rounding import add_matmul_

ALIGNMENT = 16  # elements: every gradient starts on a 64-byte boundary
BUCKET_BYTES = 25 * 2**20  # as torch's DistributedDataParallel has it


class Bucket:
    """Neighbouring gradients of one owner (a replica that steps them).

    `missing` counts the parameters whose gradients are not all there yet.
    """

    def __init__(self, owner: int, names: Sequence[str]) -> None:
        self.owner, self.names = owner, names
        self.buffer = torch.empty(0)
        self.missing = 0


class GradBuffer:
    """One fp32 buffer with a view for each parameter, by name in `views`; backward adds into them.

    It is the `modules.layers.linear.WeightGradBuffer` of the large weights; the gradient of another
    fp32
    parameter is its view, and that of a half-precision one is added to its view when backward has
    made it, and dropped. Gradients of one owner lie side by side.

    owners: for each parameter the replica that steps it, where `sharded`; else not used.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        owners: Sequence[int],
        *,
        replicas: Communicator,
        sharded: bool,
    ) -> None:
        self._replicas, self._sharded = replicas, sharded
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        sizes = {n: -(-p.numel() // ALIGNMENT) * ALIGNMENT for n, p in parameters.items()}
        device = next(iter(parameters.values())).device
        self.buffer = torch.zeros(sum(sizes.values()), dtype=torch.float32, device=device)
        self._buckets = _cut(parameters, owners if sharded else [0] * len(sizes), sizes)
        self.views = dict(_place(self.buffer, self._buckets, parameters, sizes))
        order = {name: place for place, name in enumerate(parameters)}
        self._buckets.sort(key=lambda bucket: -min(order[name] for name in bucket.names))
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.names}
        for name, parameter in parameters.items():
            self._attach(name, parameter)
        self._expected: dict[str, int] = {}
        self._waiting: list[Bucket] = []
        self._works: list[Work] = []
        self._deferred: Deferred | None = None
        self._handed_over: set[str] = set()  # parameters whose gradients autograd does not make

    def begin(self, num_microbatches: int) -> None:
        """Starts an update of so many microbatches, each of which adds to every parameter once."""
        self._expected = dict.fromkeys(self.views, num_microbatches)
        self._waiting = list(self._buckets)
        for bucket in self._buckets:
            bucket.missing = len(bucket.names)

    def finish(self) -> None:
        """Waits until all is summed over the replicas, where it is to be stepped."""
        missing = [name for bucket in self._waiting for name in bucket.names]
        assert not missing, f"no gradients came for {missing}"
        for work in self._works:
            work.wait()
        self._works.clear()

    def zero_(self) -> None:
        self.buffer.zero_()

    # ---- what backward hands over ----

    @contextmanager
    def deferring(self, deferred: Deferred | None) -> Iterator[None]:
        """Products handed over meanwhile are put off: `deferred` gets a call for each."""
        self._deferred = deferred
        try:
            yield
        finally:
            self._deferred = None

    def add_linear(
        self, weight: Tensor, bias: Tensor | None, gradient: Tensor, x: Tensor, *, last: bool
    ) -> None:
        self._handed_over.update(self._names[id(p)] for p in (weight, bias) if p is not None)
        call = partial(self._add_linear, weight, bias, gradient, x, last)
        if self._deferred is None:
            call()
        else:
            self._deferred.append(call)

    @torch.no_grad()
    def add_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        name = self._names[id(weight)]
        self._handed_over.add(name)
        view = self.views[name]
        if view.is_cuda:  # there index_add_ adds in no fixed order
            view.index_put_((rows,), gradient.float(), accumulate=True)
        else:
            view.index_add_(0, rows, gradient.float())
        self._note(name)

    @torch.no_grad()
    def _add_linear(
        self, weight: Tensor, bias: Tensor | None, gradient: Tensor, x: Tensor, last: bool
    ) -> None:
        name = self._names[id(weight)]
        add_matmul_(self.views[name], gradient.t(), x)
        if last:
            self._note(name)
        if bias is not None:
            self.views[self._names[id(bias)]].add_(gradient.sum(0, dtype=torch.float32))
            if last:
                self._note(self._names[id(bias)])

    def _attach(self, name: str, parameter: nn.Parameter) -> None:
        view = self.views[name]
        if parameter.dtype == torch.float32:
            parameter.grad = view

        def made(given: Tensor) -> None:
            if name in self._handed_over:
                return  # torch calls this also where autograd made nothing
            if given.dtype != torch.float32:
                assert given.grad is not None
                view.add_(given.grad)
                given.grad = None
            self._note(name)

        parameter.register_post_accumulate_grad_hook(made)

    # ---- the replicas ----

    def _note(self, name: str) -> None:
        """One microbatch more has added to a parameter; full buckets start on their way."""
        if name not in self._expected:
            return  # outside of an update: nobody waits
        self._expected[name] -= 1
        if self._expected[name] == 0:
            self._bucket_of[name].missing -= 1
        while self._waiting and self._waiting[0].missing == 0:
            self._works.append(self._start(self._waiting.pop(0)))

    def _start(self, bucket: Bucket) -> Work:
        if self._sharded:
            return self._replicas.reduce(bucket.buffer, root=bucket.owner)
        return self._replicas.all_reduce(bucket.buffer)


def _cut(
    parameters: Mapping[str, nn.Parameter], owners: Sequence[int], sizes: Mapping[str, int]
) -> list[Bucket]:
    """Buckets of about BUCKET_BYTES, owner after owner, in the order of the layers."""
    buckets: list[Bucket] = []
    for owner in sorted(set(owners)):
        names: list[str] = []
        for name in (n for n, o in zip(parameters, owners, strict=True) if o == owner):
            names.append(name)
            if 4 * sum(sizes[n] for n in names) >= BUCKET_BYTES:
                buckets.append(Bucket(owner, names))
                names = []
        if names:
            buckets.append(Bucket(owner, names))
    return buckets


def _place(
    buffer: Tensor,
    buckets: Sequence[Bucket],
    parameters: Mapping[str, nn.Parameter],
    sizes: Mapping[str, int],
) -> Iterator[tuple[str, Tensor]]:
    """Gives every bucket its part of the buffer, and every parameter its view."""
    offset = 0
    for bucket in buckets:
        start = offset
        for name in bucket.names:
            parameter = parameters[name]
            yield name, buffer[offset : offset + parameter.numel()].view_as(parameter)
            offset += sizes[name]
        bucket.buffer = buffer[start:offset]
