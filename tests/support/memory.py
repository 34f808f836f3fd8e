"""Peak memory of a call in bytes, counted in torch's allocator."""

import gc
from collections.abc import Callable
from typing import TypeVar

from torch.autograd.profiler import profile  # torch.profiler's is slow, as it parses all events

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """Calls `call`; returns its result, and the peak count of the bytes that it has allocated.

    The count includes memory that kernels allocate, but no memory from before the call. If the
    call frees such older memory, the count falls, because the process then uses less memory. The
    garbage collector is off during the call, because it would free the garbage of earlier tests.
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
