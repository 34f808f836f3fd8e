"""Times of repeated calls on a device: medians, with their spread."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.tensors import synchronize


@dataclass(frozen=True)
class CallTime:
    """The median of a call's milliseconds, and the smallest and the largest of them."""

    median: float
    smallest: float
    largest: float

    @property
    def spread(self) -> str:
        """Returns the smallest and the largest time as text."""
        return f"{self.smallest:.3g} to {self.largest:.3g} ms"


def time_calls(
    call: Callable[[], object],
    device: torch.device,
    *,
    repeats: int = 9,
    inner: int = 1,
    warmup: int = 2,
) -> CallTime:
    """Measures a call; on CUDA with events, so the host's time counts only where the GPU waits.

    Args:
        repeats: the number of measured times.
        inner: the calls in one measured time, which is divided by them.
        warmup: the calls before the first measured time.
    """
    for _ in range(warmup):
        call()
    times = [_milliseconds(call, device, inner) / inner for _ in range(repeats)]
    return CallTime(statistics.median(times), min(times), max(times))


def _milliseconds(call: Callable[[], object], device: torch.device, count: int) -> float:
    synchronize(device)
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return 1000 * (time.perf_counter() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(count):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last))
