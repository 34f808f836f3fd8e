"""The learning rate of an update: a linear warm-up, then a decay, both counted in updates."""

import math
from collections.abc import Callable


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


# The part of the peak, from 1 to 0, by the part of the updates after the warm-up that are done.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
}


def learning_rate(
    update: int, *, kind: str, warmup: int, total: int, peak: float, lowest: float
) -> float:
    """Returns the learning rate of an update.

    With `lowest` 0 it is exactly that of transformers' get_{linear,cosine,constant}_schedule_with_
    warmup: the first update of a warm-up has rate 0.

    Args:
        update: the number of the update; the first is 0.
        kind: one of `DECAYS`.
        warmup: the number of updates until the peak.
        total: the number of updates of the run.
        peak: the highest rate.
        lowest: the rate after the last update.
    """
    if update < warmup:
        return peak * (update / max(1, warmup))
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return lowest + (peak - lowest) * DECAYS[kind](progress)
