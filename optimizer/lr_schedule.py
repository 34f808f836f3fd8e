"""The learning rate of an update: a linear warm-up, then a fall, counted in updates."""

from __future__ import annotations

import math
from collections.abc import Callable


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


# What is left of the peak, of 1, when `progress` of the updates after the warm-up are done.
FALLS: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
}


def learning_rate(
    update: int, *, kind: str, warmup: int, total: int, peak: float, lowest: float
) -> float:
    """The rate of update number `update` (the first is 0) of `total`, which falls to `lowest`.

    With `lowest` 0 exactly transformers' get_{linear,cosine,constant}_schedule_with_warmup: the
    first update of a warm-up has rate 0.
    """
    if update < warmup:
        return peak * (update / max(1, warmup))
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return lowest + (peak - lowest) * FALLS[kind](progress)
