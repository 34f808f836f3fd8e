"""The measured speed of a device in matmuls that have the sizes of a model."""

import statistics
import time

import torch
from torch import Tensor

from common.tensors import synchronize
from modules.matmul.rounding import linear

_FIRST_ROWS = 16
_GROWTH = 4


@torch.no_grad()
def matmul_rate(
    *, rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, budget: float
) -> float:
    """Measures multiply-adds per second of a (rows, inputs) x (inputs, outputs) matmul in `dtype`.

    The measurement takes about `budget` seconds. If several processes share a device, they must
    call this function at the same time; then each measures the speed of its share. If a matmul of
    all rows would take too long, fewer rows are used.
    """
    began = time.monotonic()
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    count = min(_FIRST_ROWS, rows)
    _seconds(weight.new_ones((count, inputs)), weight)  # warms up
    while True:
        x = weight.new_ones((count, inputs))
        seconds = _seconds(x, weight)
        left = budget - (time.monotonic() - began)
        if count == rows or _GROWTH * seconds > left:
            break
        count = min(count * _GROWTH, rows)
    measured = [seconds]
    while budget - (time.monotonic() - began) > measured[-1]:
        measured.append(_seconds(x, weight))
    return count * inputs * outputs / statistics.median(measured)


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Returns the seconds of one matmul, until the device has finished it."""
    synchronize(weight.device)
    began = time.perf_counter()
    linear(x, weight, None)
    synchronize(weight.device)
    return time.perf_counter() - began
