"""All gradients of a stage in one fp32 buffer, so that replicas exchange one long message."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from comm.communicator import Communicator

ALIGNMENT = 16  # elements: every gradient starts on a 64-byte boundary


class FlatGradients:
    """One fp32 buffer with a view for each parameter, by name in `views`; backward adds into them.

    Gradients of one owner (a replica that steps them) lie side by side. The gradient of an fp32
    parameter is its view; that of a half-precision one is added to its view when backward has made
    it, and dropped.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], owners: Sequence[int]) -> None:
        names = sorted(parameters, key=dict(zip(parameters, owners, strict=True)).__getitem__)
        sizes = {n: -(-parameters[n].numel() // ALIGNMENT) * ALIGNMENT for n in names}
        device = next(iter(parameters.values())).device
        self.buffer = torch.zeros(sum(sizes.values()), dtype=torch.float32, device=device)
        self.views: dict[str, Tensor] = {}
        self._segments = _segments(self.buffer, [sizes[n] for n in names], sorted(owners))
        offset = 0
        for name in names:
            parameter = parameters[name]
            view = self.buffer[offset : offset + parameter.numel()].view_as(parameter)
            _attach(parameter, view)
            self.views[name] = view
            offset += sizes[name]

    def zero_(self) -> None:
        self.buffer.zero_()

    def scale_(self, factor: float) -> None:
        if factor != 1.0:
            self.buffer.mul_(factor)

    def all_reduce(self, replicas: Communicator) -> None:
        """Sums the buffers of all replicas into each of them."""
        replicas.all_reduce(self.buffer)

    def reduce_to_owners(self, replicas: Communicator) -> None:
        """Sums over all replicas what each owns, into its buffer; the rest of it is left over."""
        for owner, segment in self._segments.items():
            replicas.reduce(segment, root=owner)


def _segments(buffer: Tensor, sizes: Sequence[int], owners: Sequence[int]) -> dict[int, Tensor]:
    totals: dict[int, int] = {}
    for size, owner in zip(sizes, owners, strict=True):
        totals[owner] = totals.get(owner, 0) + size
    return dict(zip(totals, torch.split(buffer, list(totals.values())), strict=True))


def _attach(parameter: nn.Parameter, view: Tensor) -> None:
    if parameter.dtype == torch.float32:
        parameter.grad = view
        return

    def add(made: Tensor) -> None:
        assert made.grad is not None
        view.add_(made.grad)
        made.grad = None

    parameter.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]


def same_on_all(tensors: Iterable[Tensor], replicas: Communicator) -> bool:
    """Whether every replica holds the same bits, by a checksum of each tensor."""
    sums = [t.contiguous().view(torch.int32).sum(dtype=torch.int64) for t in tensors]
    gathered = replicas.all_gather(torch.stack(sums))
    return bool((gathered == gathered[0]).all())
