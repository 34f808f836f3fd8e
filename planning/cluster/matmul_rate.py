"""How fast a device multiplies matrices of a model's sizes, as its layers do: measured."""

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
    """Multiply-adds per second of (rows, inputs) through a layer of `outputs`, in the compute type.

    Measured for about `budget` seconds, so that processes that share a device and begin together
    share it to the end; of fewer rows where all would take longer. It keeps the layer's weight for
    as long: inputs x outputs numbers.
    """
    began = time.monotonic()
    weight = torch.ones(outputs, inputs, dtype=dtype, device=device)
    count = min(_FIRST_ROWS, rows)
    _seconds(_rows(weight, count), weight)  # wakes what sleeps
    while True:
        x = _rows(weight, count)
        seconds = _seconds(x, weight)
        left = budget - (time.monotonic() - began)
        if count == rows or _GROWTH * seconds > left:
            break
        count = min(count * _GROWTH, rows)
    found = [seconds]
    while budget - (time.monotonic() - began) > found[-1]:
        found.append(_seconds(x, weight))
    return count * inputs * outputs / statistics.median(found)


def _rows(weight: Tensor, count: int) -> Tensor:
    return weight.new_ones((count, weight.shape[1]))


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Of one product, on a GPU until it is done there."""
    synchronize(weight.device)
    began = time.perf_counter()
    linear(x, weight, None)
    synchronize(weight.device)
    return time.perf_counter() - began
