"""The measured rate of a device in matmuls of a model's sizes, as its layers compute them."""

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
    """Measures the multiply-adds per second of (rows, inputs) times (inputs, outputs) in `dtype`.

    It takes about `budget` seconds, so that processes that share a device and start together share
    it to the end. It uses fewer rows where all would take longer.
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
    """Returns the seconds of one matmul, on a GPU until it is done there."""
    synchronize(weight.device)
    began = time.perf_counter()
    linear(x, weight, None)
    synchronize(weight.device)
    return time.perf_counter() - began
