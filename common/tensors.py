"""Tensor functions that several packages use: dtypes, finite values, and pinned host memory."""

import os
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.text import format_bytes

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


class HostMemoryError(MemoryError):
    """The error of an allocation of host memory that failed; the text names the size."""


def pinned_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns an uninitialised tensor in host memory, for copies to or from `device`.

    If `device` is a GPU, the tensor is pinned: only then can a copy run beside the computation. In
    a dry run, the device `meta` stands for a GPU. The tensor then has a storage of the size that
    pinned memory has, so that the dry run counts it.

    Raises:
        HostMemoryError: the host has too little memory that can be pinned.
    """
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if device.type == "meta":
        storage = torch.empty(pinned_bytes(num_bytes), dtype=torch.uint8)
        return storage[:num_bytes].view(dtype).view(tuple(shape))
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    except RuntimeError as error:
        # CUDA uses the words of a full GPU: "CUDA error: out of memory"
        if device.type != "cuda" or "out of memory" not in str(error):
            raise
        needed = format_bytes(pinned_bytes(num_bytes))
        raise HostMemoryError(f"tried to allocate {needed} of pinned host memory") from error


_NO_LIMIT = 1 << 64


def pinned_bytes(num_bytes: int) -> int:
    """Returns the bytes of a pinned tensor of `num_bytes`; torch rounds them up to a power of two.

    torch rounds unless the size is above `pinned_max_round_threshold_mb` or above
    `pinned_max_cached_size_mb` (both in MiB, a size equal to the limit is rounded; options of the
    allocator since torch 2.13, in PYTORCH_ALLOC_CONF). If PYTORCH_CUDA_ALLOC_CONF is set, even to
    nothing, torch reads only this variable. Sources: ATen/core/CachingHostAllocator.h and
    c10/cuda/CUDAAllocatorConfig.h of torch 2.13.0, and the values in its libc10.so for variables
    that were set. Memory that the system adds to fill the last page is not counted.
    """
    options = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_ALLOC_CONF", ""))
    names = "pinned_max_round_threshold_mb", "pinned_max_cached_size_mb"
    if num_bytes == 0 or num_bytes > min(_limit(options, name) for name in names):
        return num_bytes
    return 1 << (num_bytes - 1).bit_length()


def _limit(options: str, name: str) -> int:
    """Returns the value of `name` in allocator options (`a:1,b:2`), in bytes; the last one counts.

    The separators are those of c10's ConfigTokenizer, which ignores white space.
    """
    values = re.findall(rf"(?:^|,){name}:(\d+)", re.sub(r"\s", "", options))
    return int(values[-1]) << 20 if values else _NO_LIMIT
