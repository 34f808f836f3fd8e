"""The measured speed of a device in matmuls that have the sizes of a model."""

import statistics
import time

import torch
from torch import Tensor

from arguments.settings import Settings
from common.tensors import DTYPES, synchronize
from modules.matmul.rounding import linear
from modules.model_sizes import ModelSizes

_FIRST_ROWS = 16
_GROWTH = 4
_NUM_VALUES = 1_000_003  # prime, so that rows of a matrix differ; drawing more takes long on a CPU


def block_rate(
    settings: Settings, sizes: ModelSizes | None, device: torch.device, *, budget: float
) -> float:
    """Measures a rank's multiply-adds per second in the largest matmul of a block.

    `sizes` is None if the model is not known. The measurement takes about `budget` seconds.
    """
    hidden = settings.model.embedding_dim if sizes is None else sizes.hidden
    return matmul_rate(
        rows=settings.update.micro_batch_size * settings.update.seq_length,
        inputs=hidden,
        outputs=4 * hidden if sizes is None else sizes.inner,
        dtype=DTYPES[settings.precision.precision],
        device=device,
        budget=budget,
    )


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
    values = _random_values(dtype, device)
    weight = _matrix(outputs, inputs, values)
    count = min(_FIRST_ROWS, rows)
    _seconds(_matrix(count, inputs, values), weight)  # warms up
    while True:
        x = _matrix(count, inputs, values)
        seconds = _seconds(x, weight)
        left = budget - (time.monotonic() - began)
        if count == rows or _GROWTH * seconds > left:
            break
        count = min(count * _GROWTH, rows)
    measured = [seconds]
    while budget - (time.monotonic() - began) > measured[-1]:
        measured.append(_seconds(x, weight))
    return count * inputs * outputs / statistics.median(measured)


def _random_values(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns normally distributed numbers, the same in every call.

    A GPU multiplies constant numbers faster than a model's numbers, because fewer bits change, so
    the GPU needs less power and lowers its clock less.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUM_VALUES, generator=generator).to(device, dtype)


def _matrix(rows: int, columns: int, values: Tensor) -> Tensor:
    """Returns a matrix (rows, columns) filled with `values`, repeated as often as necessary."""
    count = rows * columns
    return values.repeat(-(-count // len(values)))[:count].view(rows, columns)


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Returns the seconds of one matmul, until the device has finished it."""
    synchronize(weight.device)
    began = time.perf_counter()
    linear(x, weight, None)
    synchronize(weight.device)
    return time.perf_counter() - began
