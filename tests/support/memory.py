"""Peak memory of a call in bytes, counted in torch's allocator."""

import gc
from collections.abc import Callable
from typing import TypeVar

from torch.autograd.profiler import profile  # torch.profiler's is slow, as it parses all events

Result = TypeVar("Result")


def peak_bytes(call: Callable[[], Result]) -> tuple[Result, int]:
    """Calls `call`; returns its result, and the largest rise of memory in use, in bytes.

    The rise is measured from the start of the call. It includes memory that a kernel allocates and
    frees again. If the call frees a tensor from before the call, the rise becomes smaller. The
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
