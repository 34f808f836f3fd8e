"""How many bytes of tensors a call holds at once, counted at torch's allocator."""

import gc
from collections.abc import Callable
from typing import TypeVar

from torch.autograd.profiler import profile  # torch.profiler's parses every event: slow

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """What `call` returns, and the most bytes that it had allocated and not freed at any time.

    What kernels allocate for themselves counts, and what was there before does not. Memory that
    was there before and is freed meanwhile makes room, as it does on the machine. The garbage of
    earlier tests must not: the collector rests during the call.
    """
    gc.disable()
    try:
        with profile(use_cpu=True, use_kineto=True, profile_memory=True) as recorded:
            result = call()
    finally:
        gc.enable()
    assert recorded.kineto_results is not None
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak
