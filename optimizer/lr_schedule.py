"""The learning rate of each update: a linear warm-up, followed by a decay."""

import math
from collections.abc import Callable


def _linear(progress: float) -> float:
    return 1.0 - progress


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


# Each function gets the finished fraction (0 to 1) of the updates after the warm-up. It returns 1
# for the peak rate, and 0 for the lowest rate.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "constant": _constant,
}


def learning_rate(
    update: int, *, kind: str, warmup: int, total: int, peak: float, lowest: float
) -> float:
    """Returns the learning rate of an update.

    If `lowest` is 0, the rate is the same as with get_linear_schedule_with_warmup in transformers
    (or get_cosine_..., get_constant_...). The first update of a warm-up has rate 0.

    Args:
        update: the number of the update; the first is 0.
        kind: a key of `DECAYS`.
        warmup: the number of updates before the peak.
        total: the number of updates of the run.
        peak: the highest rate.
        lowest: the rate after the last update, unless `kind` is "constant".
    """
    if update < warmup:
        return peak * (update / max(1, warmup))
    progress = min(1.0, (update - warmup) / max(1, total - warmup))
    return lowest + (peak - lowest) * DECAYS[kind](progress)
