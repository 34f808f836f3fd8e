"""Checks of copies to the host, of the tracer, and of the words of out-of-memory.

On a GPU, sleeps are queued before and after the copies. A copy that does not wait for the GPU's
earlier work, or that is read before it has arrived, has wrong values. A CPU runs nothing
asynchronously, so it checks only the values.
"""

import re
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from checkpoint.snapshot import Snapshot, to_host
from common.tensors import synchronize
from monitor.out_of_memory import is_out_of_memory, requested_size
from monitor.profiling.cuda_tracer import CudaTracer
from monitor.profiling.tracer import HostTracer, SpanTracer, StepLog, Track
from optimizer.offload import HostCopies
from tests.gpu.report import CheckReport, Options

MIB = 2**20
CYCLES_PER_SECOND = 1.5e9  # about the clock of a GPU; a sleep may be shorter or longer
SLEEP = 0.1  # seconds
WAKE_UP = 10_000_000  # nanoseconds in which a host that waited for the GPU surely runs again


def queue_sleep(device: torch.device, seconds: float) -> None:
    """Queues a sleep of about `seconds` on the current stream of a GPU; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))


# ---- copies ----


def check_copies(report: CheckReport, options: Options) -> None:
    """Checks a checkpoint's snapshot and offload's host copies, with queued sleeps around them."""
    device = torch.device(options.device)
    if not options.is_cuda:
        report.measure("sleeps around copies", "none", note="a CPU runs nothing asynchronously")
    _check_snapshot(report, device)
    _check_host_copies(report, device)


def _check_snapshot(report: CheckReport, device: torch.device) -> None:
    flat = torch.zeros(8 * MIB, device=device)
    state = {"weights": {"a": flat[: MIB // 2], "b": flat[MIB // 2 :]}, "updates": 3}
    snapshot = Snapshot()
    snapshot.take(state)  # allocates the buffers
    for value in (1.0, 2.0):
        queue_sleep(device, SLEEP)
        flat.fill_(value)  # queued behind the sleep
        copied = snapshot.take(state)
        now = [_range(copied["weights"][name]) for name in ("a", "b")]
        report.expect(f"snapshot {value:.0f}: the values at the call", _all_are(now, value))
        flat.fill_(-1.0)
        synchronize(device)
        later = [_range(copied["weights"][name]) for name in ("a", "b")]
        report.expect(
            f"snapshot {value:.0f}: later changes do not reach it", _all_are(later, value)
        )
    queue_sleep(device, SLEEP)
    flat.fill_(5.0)
    held = to_host(state)["weights"]
    report.expect("checkpoint.to_host: the values at the call", _all_are([_range(held["b"])], 5.0))


def _check_host_copies(report: CheckReport, device: torch.device) -> None:
    """Uses the copies as an update with offload does, and then overwrites the gradients."""
    gradients = [
        torch.zeros(size, device=device) for size in (4 * MIB, 7, MIB, 4 * MIB, 3, 2 * MIB)
    ]
    copies = HostCopies(max(map(len, gradients)), device)
    for update in (1, 2):
        queue_sleep(device, SLEEP)
        for number, gradient in enumerate(gradients):
            gradient.fill_(10.0 * update + number)
        found = [_range(copy) for copy in copies.of(gradients)]
        for gradient in gradients:
            gradient.zero_()
        queue_sleep(device, SLEEP)
        holds = [low == high == 10.0 * update + n for n, (low, high) in enumerate(found)]
        note = "" if all(holds) else f"wrong: {[n for n, right in enumerate(holds) if not right]}"
        report.expect(f"host copies of update {update}", all(holds), note=note)


def _range(tensor: Tensor) -> tuple[float, float]:
    """Returns the lowest and the highest value at this time."""
    low, high = torch.aminmax(tensor)
    return low.item(), high.item()


def _all_are(ranges: list[tuple[float, float]], value: float) -> bool:
    return all(low == high == value for low, high in ranges)


# ---- the tracer ----


def check_tracer(report: CheckReport, options: Options) -> None:
    """Compares a sleep's span with the host's clock around the step, after a step without sleep.

    The span lies inside the host's interval. The rest of the interval is as long as a step without
    a sleep, apart from the time that the host needs to wake up.
    """
    device = torch.device(options.device)
    log = StepLog(lambda steps: None)
    tracer: SpanTracer = CudaTracer(log) if options.is_cuda else HostTracer(log)
    outside = []
    for step, seconds in enumerate((0.0, 0.0, 2 * SLEEP)):  # the first step also loads kernels
        synchronize(device)
        begin = time.perf_counter_ns()
        with tracer.step(step), tracer.span(Track.FORWARD_COMPUTE, microbatch=step):
            if options.is_cuda:
                queue_sleep(device, seconds)
            else:
                time.sleep(seconds)
        synchronize(device)
        outside.append((begin, time.perf_counter_ns()))
    trace = tracer.steps[-1]
    (span,) = trace.spans
    begin, end = outside[-1]
    interval, empty = end - begin, outside[1][1] - outside[1][0]
    is_inside = begin <= trace.begin <= span.begin <= span.end <= trace.end <= end + WAKE_UP
    report.expect("tracer: span inside step inside host's interval", is_inside)
    value = (interval - (span.end - span.begin)) / (empty + WAKE_UP)
    note = f"the sleep took {interval / 1e6:.1f} ms"
    report.expect("tracer: the span has the sleep's length", value <= 1, value, "of allowed", note)
    tracer.close()


# ---- out of memory ----


def check_out_of_memory(report: CheckReport, options: Options) -> None:
    """Checks that errors of allocations that cannot succeed are recognised; runs last."""
    device = torch.device(options.device)
    # More fp32 numbers than any machine holds; on a GPU within CUDA's address space, because CUDA
    # answers "invalid argument" to larger numbers.
    absurd = 2**41 if options.is_cuda else 2**50
    _expect_recognised(
        report, "memory of the device", lambda: torch.empty(absurd, device=device), has_size=True
    )
    _expect_recognised(report, "host copies", lambda: HostCopies(absurd, device))
    if not options.is_cuda:
        report.measure("cuBLAS and cuDNN without memory", "none", note="needs a GPU")
        return
    _expect_recognised(report, "pinned memory", lambda: torch.empty(absurd, pin_memory=True))
    _check_full_gpu(report, device)


def _check_full_gpu(report: CheckReport, device: torch.device) -> None:
    """Calls cuBLAS and cuDNN for the first time in a new thread, while all memory is in use.

    cuDNN may answer that it finds no way to compute. Such an answer is only reported.
    """
    a, out = torch.zeros(64, 64, device=device), torch.empty(64, 64, device=device)
    image = torch.zeros(1, 8, 32, 32, device=device, dtype=torch.float16)
    kernel = torch.zeros(8, 8, 3, 3, device=device, dtype=torch.float16)
    spare = torch.empty(MIB // 2, dtype=torch.uint8, device=device)  # for the calls' results
    held, size = [], torch.cuda.get_device_properties(device).total_memory
    while size >= MIB // 2:
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
    del spare
    calls: dict[str, Callable[[], Tensor]] = {
        "cuBLAS": lambda: torch.mm(a, a, out=out),
        "cuDNN": lambda: functional.conv2d(image, kernel),
    }
    for name, call in calls.items():
        title, error = f"out of memory, {name}", _error_in_thread(call)
        if error is None:
            report.measure(title, "none", note="the call needed no memory")
        elif name == "cuBLAS" or re.search("memory|alloc", str(error), re.IGNORECASE):
            _expect_words(report, title, error)
        else:
            report.measure(title, type(error).__name__, note=_words(error))
    held.clear()
    torch.cuda.empty_cache()
    torch.mm(a, a, out=out)
    report.expect("out of memory: the GPU computes again", bool((out == 0).all()))


def _error_in_thread(call: Callable[[], object]) -> Exception | None:
    """Calls `call` in a new thread, to which cuBLAS and cuDNN give new handles."""
    errors = []

    def run() -> None:
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors[0] if errors else None


def _expect_recognised(
    report: CheckReport, what: str, allocate: Callable[[], object], *, has_size: bool = False
) -> None:
    title = f"out of memory, {what}"
    try:
        allocate()
    except Exception as error:
        _expect_words(report, title, error)
        if has_size:
            report.expect(f"{title}: the size", requested_size(error) != "", requested_size(error))
    else:
        report.expect(f"{title}: an error", False, note="the allocation succeeded")


def _expect_words(report: CheckReport, title: str, error: Exception) -> None:
    holds = is_out_of_memory(error)
    report.expect(f"{title}: recognised", holds, type(error).__name__, note=_words(error))


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
