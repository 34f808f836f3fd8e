"""Linear warm-up, then linear decay to zero, counted in updates."""

from __future__ import annotations


def linear_schedule(update: int, *, warmup: int, total: int, peak: float) -> float:
    """The rate of update number `update` (the first is 0) of `total`.

    Exactly transformers' get_linear_schedule_with_warmup: the first update of a warm-up has rate 0.
    """
    if update < warmup:
        return peak * (update / max(1, warmup))
    return peak * max(0.0, (total - update) / max(1, total - warmup))
