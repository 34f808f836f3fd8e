"""How many bytes of tensors a call holds at once, counted at torch's allocator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """What `call` returns, and the most bytes that it had allocated and not freed at any time.

    What kernels allocate for themselves counts, and what was there before does not. Memory that
    was there before and is freed meanwhile makes room, as it does on the machine.
    """
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as recorded:
        result = call()
    kineto = recorded.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak
