"""One fp32 buffer for all gradients of a stage, cut into buckets that the replicas exchange.

Backward adds gradients to the buffer. A bucket is ready when all its gradients are complete; at
this time backward still computes other gradients. Buckets become ready in the reverse order of the
layers, and this order is the same on all replicas.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from data_parallel.zero_partition import ZeroPartition
from modules.layers.linear import Deferred
from modules.matmul.rounding import add_matmul_

ALIGNMENT = 16  # elements: every gradient starts on a 64-byte boundary
BUCKET_BYTES = 25 * 2**20  # as in torch's DistributedDataParallel


class Bucket:
    """Neighbouring gradients of weights with the same owner, exchanged in one operation.

    owner: the replica that updates the weights; the first replica if all replicas update them.
    names: the names of the weights.
    gradients: the slice of the buffer with the gradients of these weights, in one dimension.
    num_incomplete: the number of gradients to which some microbatches have not added yet.
    """

    def __init__(self, owner: int, names: Sequence[str]) -> None:
        self.owner, self.names = owner, names
        self.gradients = torch.empty(0)
        self.num_incomplete = 0


class GradBuffer:
    """The fp32 buffer `flat` for the gradients; `views` has a view of it for each parameter.

    Linear layers and the embedding add their gradients through the methods of
    `modules.layers.linear.WeightGradBuffer`. For all other parameters autograd makes the gradient.
    The `grad` of every fp32 parameter is its view, so autograd adds to the buffer. The `grad` of an
    fp16 or bf16 parameter is a separate tensor; a hook adds it to the view and deletes it. Frozen
    parameters have no gradient.

    Args:
        parameters: the weights of a stage by name, already in the compute type.
        partition: the replicas that update each weight. Gradients of weights with the same owner
            are neighbours in the buffer.
        on_ready: a function that is called with each bucket whose gradients are complete.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        partition: ZeroPartition,
        on_ready: Callable[[Bucket], None],
    ) -> None:
        self._on_ready = on_ready
        trained = {name: parameters[name] for name in partition.names}
        self._names = {id(parameter): name for name, parameter in trained.items()}
        sizes = {n: -(-p.numel() // ALIGNMENT) * ALIGNMENT for n, p in trained.items()}
        device = next(iter(parameters.values())).device
        self.flat = torch.zeros(sum(sizes.values()), dtype=torch.float32, device=device)
        self._buckets = _cut(partition, sizes)
        self.views = dict(_place(self.flat, self._buckets, trained, sizes))
        order = {name: place for place, name in enumerate(trained)}
        self._buckets.sort(key=lambda bucket: -min(order[name] for name in bucket.names))
        self._bucket_of = {name: bucket for bucket in self._buckets for name in bucket.names}
        for name, parameter in trained.items():
            self._attach(name, parameter)
        self._num_expected: dict[str, int] = {}
        self._pending: list[Bucket] = []
        self._deferred: Deferred | None = None
        self._handed_over: set[str] = set()  # parameters with gradients not made by autograd

    def expect(self, num_microbatches: int) -> None:
        """Begins an update; each of `num_microbatches` microbatches adds once to every gradient."""
        self._num_expected = dict.fromkeys(self.views, num_microbatches)
        self._pending = list(self._buckets)
        for bucket in self._buckets:
            bucket.num_incomplete = len(bucket.names)

    def check_complete(self) -> None:
        """Raises AssertionError unless all gradients of the update are complete."""
        incomplete = [name for bucket in self._pending for name in bucket.names]
        assert not incomplete, f"no gradients came for {incomplete}"

    def zero_(self) -> None:
        """Sets all gradients to zero."""
        self.flat.zero_()

    # ---- additions of backward ----

    @contextmanager
    def deferring(self, deferred: Deferred | None) -> Iterator[None]:
        """Defers all additions that linear layers make in the `with` block.

        Each addition is appended to `deferred` as a function without arguments, to be called later.
        If `deferred` is None, no addition is deferred.
        """
        self._deferred = deferred
        try:
            yield
        finally:
            self._deferred = None

    def add_linear(
        self, weight: Tensor, bias: Tensor | None, gradient: Tensor, x: Tensor, *, last: bool
    ) -> None:
        """Adds the gradients of a linear layer to the buffer; see `WeightGradBuffer.add_linear`."""
        trained = [p for p in (weight, bias) if p is not None and p.requires_grad]
        self._handed_over.update(self._names[id(p)] for p in trained)
        self.run_or_defer(partial(self._add_linear, weight, bias, gradient, x, last))

    def run_or_defer(self, call: Callable[[], None]) -> None:
        """Calls `call` now or, in a `deferring` block, appends it to the deferred additions."""
        if self._deferred is None:
            call()
        else:
            self._deferred.append(call)

    @torch.no_grad()
    def add_rows(self, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Adds the gradient of an embedding to the buffer; see `WeightGradBuffer.add_rows`."""
        name = self._names[id(weight)]
        self._handed_over.add(name)
        view = self.views[name]
        if view.is_cuda:  # on a GPU index_add_ adds in no fixed order
            view.index_put_((rows,), gradient.float(), accumulate=True)
        else:
            view.index_add_(0, rows, gradient.float())
        self.count_microbatch(name)

    @torch.no_grad()
    def _add_linear(
        self, weight: Tensor, bias: Tensor | None, gradient: Tensor, x: Tensor, last: bool
    ) -> None:
        if weight.requires_grad:
            name = self._names[id(weight)]
            add_matmul_(self.views[name], gradient.t(), x)
            if last:
                self.count_microbatch(name)
        if bias is not None and bias.requires_grad:
            name = self._names[id(bias)]
            self.views[name].add_(gradient.sum(0, dtype=torch.float32))
            if last:
                self.count_microbatch(name)

    def _attach(self, name: str, parameter: nn.Parameter) -> None:
        view = self.views[name]
        if parameter.dtype == torch.float32:
            parameter.grad = view

        def accumulated(parameter: Tensor) -> None:
            if name in self._handed_over:
                return  # torch calls the hook also if autograd made no gradient
            if parameter.dtype != torch.float32:
                assert parameter.grad is not None
                view.add_(parameter.grad)
                parameter.grad = None
            self.count_microbatch(name)

        parameter.register_post_accumulate_grad_hook(accumulated)

    def count_microbatch(self, name: str) -> None:
        """Counts a microbatch's gradient of `name`; calls `on_ready` for newly ready buckets."""
        if name not in self._num_expected:
            return  # no update has begun
        self._num_expected[name] -= 1
        if self._num_expected[name] == 0:
            self._bucket_of[name].num_incomplete -= 1
        while self._pending and self._pending[0].num_incomplete == 0:
            self._on_ready(self._pending.pop(0))


def _cut(partition: ZeroPartition, sizes: Mapping[str, int]) -> list[Bucket]:
    """Returns buckets of about BUCKET_BYTES, sorted by owner and then in the order of the layers.

    `sizes` has the number of elements of each weight's gradient, by name.
    """
    buckets: list[Bucket] = []
    for owner in sorted({partition.owner(name) for name in sizes}):
        names: list[str] = []
        for name in (name for name in sizes if partition.owner(name) == owner):
            names.append(name)
            if 4 * sum(sizes[n] for n in names) >= BUCKET_BYTES:
                buckets.append(Bucket(owner, names))
                names = []
        if names:
            buckets.append(Bucket(owner, names))
    return buckets


def _place(
    flat: Tensor,
    buckets: Sequence[Bucket],
    parameters: Mapping[str, nn.Parameter],
    sizes: Mapping[str, int],
) -> Iterator[tuple[str, Tensor]]:
    """Sets `gradients` of every bucket; yields each parameter's name and its view of `flat`."""
    offset = 0
    for bucket in buckets:
        start = offset
        for name in bucket.names:
            parameter = parameters[name]
            yield name, flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += sizes[name]
        bucket.gradients = flat[start:offset]
