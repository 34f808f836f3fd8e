"""Experiments beside kernels that wait on the GPU: the host's calls, queues, memory and matmuls.

    python -m tests.gpu.spin_lab launches

Check 1 starts each experiment in a process of its own, because the environment variables of CUDA
take effect when CUDA starts. The process imports everything, then waits for a line on standard
input: its time limit in seconds. So the imports of all experiments run at the same time, and the
experiments one after another. The last line of standard output is the result, as JSON.

A call is "held" if it returns only after the waiting kernel was released. In training, the release
can depend on the calls after it, and then it is a deadlock.
"""

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from comm.backends.hang_detector import HangDetector
from comm.backends.streams import compute_event
from modules.attention.sdpa import disable_cudnn_attention
from tests.gpu.timing import time_calls
from tests.gpu.waiting_kernel import WaitingKernels, load_kernels

_HOLD = 1.5  # seconds that a kernel waits at most
_STREAMS = (1, 2, 4, 7, 8, 12, 16, 20, 24, 31)
_QUEUED = 0.2  # seconds after which a small kernel that has not run counts as held
_BLOCKS = (2, 8, 16, 32)
_SHARED_BYTES = 64 * 2**10
_GIB = 2**30
_DETECTOR_LIMIT = 0.3

Result = dict[str, Any]
_attend = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class HostCall:
    """A call of the host while a kernel waits.

    seconds: the call's time.
    held: whether it returned only after the kernel was released.
    query: the longest `event.query()` in another thread, in seconds.
    stopped: the longest time for which a thread that calls no function of CUDA could not run.
    error: the error of the call; "" if there is none.
    """

    name: str
    seconds: float
    held: bool
    query: float
    stopped: float
    error: str


def launches() -> Result:
    """Makes calls beside a waiting kernel: launches for the first time and again, and memory."""
    x = torch.zeros(64, 64, device="cuda")
    a = torch.zeros(256, 256, device="cuda", dtype=torch.bfloat16)
    q = torch.zeros(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16)
    w = torch.ones(128, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kernels: dict[str, Callable[[], object]] = {
        "elementwise kernel": lambda: torch.hypot(x, x),  # not one that torch compiles when called
        "matmul": lambda: a @ a,
        "layer norm": lambda: torch.nn.functional.layer_norm(a, (256,)),
        "attention": lambda: _attend(q, q, q, is_causal=True),
        "backward in autograd's thread": lambda: (w @ w).sum().backward(),
        "backward in this thread": lambda: _backward_here(w),
    }
    calls = []
    for name, kernel in kernels.items():
        calls += [_host_call(f"first {name}", kernel), _host_call(f"{name} again", kernel)]
    memory: dict[str, Callable[[], object]] = {
        "cudaMalloc of 1 GiB": lambda: torch.empty(_GIB, dtype=torch.uint8, device="cuda"),
        "cudaFree (empty_cache)": torch.cuda.empty_cache,
        "64 MiB of pinned memory": lambda: torch.empty(2**26, dtype=torch.uint8, pin_memory=True),
        "tensor of a float": lambda: torch.tensor(1.0, device="cuda"),
        "new event, recorded": lambda: torch.cuda.current_stream().record_event(),
    }
    calls += [_host_call(name, call) for name, call in memory.items()]
    return {"calls": [asdict(call) for call in calls]}


def queues() -> Result:
    """Tells beside how many waiting streams, of high and normal priority, compute is held."""
    x = torch.ones(1024, device="cuda")
    x.add_(1)
    held: dict[str, list[int]] = {}
    for name, priority in (("high", -1), ("normal", 0)):
        held[name] = []
        for count in _STREAMS:
            with WaitingKernels(_HOLD, streams=count, priority=priority) as waiting:
                x.add_(1)
                done = torch.cuda.current_stream().record_event()
                deadline = time.monotonic() + _QUEUED
                while not done.query() and time.monotonic() < deadline:
                    time.sleep(0.001)
                if waiting.is_released or not done.query():
                    held[name].append(count)
    return {"held": held, "streams": _STREAMS}


def beside() -> Result:
    """Runs the experiments in the environment that training sets."""
    experiments = (_posting, _detector, _allocator, _theft)
    results: Result = {}
    for experiment in experiments:
        name = experiment.__name__.removeprefix("_")
        try:
            results[name] = experiment()
        except Exception as error:  # one experiment must not cost the results of the others
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return results


def _posting() -> Result:
    """Plays a stage that posts receives early, or by the rule; returns the host's seconds.

    The peer sends message i after it received this stage's message i. Early means that receive i is
    posted before the work for message i is launched. By the rule it is posted afterwards. A kernel
    is cold if the process never launched it.
    """
    x = torch.rand(64, 64, device="cuda")
    torch.cuda._sleep(1)
    early, rule = (torch.nextafter, torch.fmod), (torch.heaviside, torch.atan2)
    return {
        "early, cold": _exchange(early, x, is_early=True),
        "early, warm": _exchange(early, x, is_early=True),
        "rule, cold": _exchange(rule, x, is_early=False),
        "rule, warm": _exchange(rule, x, is_early=False),
        "hold": _HOLD,
    }


def _exchange(
    kernels: Sequence[Callable[[Tensor, Tensor], object]], x: Tensor, *, is_early: bool
) -> float:
    """Exchanges a message with a peer for each kernel; returns the seconds until the GPU is idle.

    The work for a message is a kernel and some 25 ms of waiting, so by the rule the second kernel
    is launched while the first receive still waits.
    """
    peer = torch.cuda.Stream()
    receives = []
    torch.cuda.synchronize()
    began = time.monotonic()
    for kernel in kernels:
        if is_early:
            receives.append(WaitingKernels(_HOLD))
        kernel(x, x)
        torch.cuda._sleep(50_000_000)
        peer.wait_stream(torch.cuda.current_stream())  # this stage's message
        if not is_early:
            receives.append(WaitingKernels(_HOLD))
        receives[-1].release_on(peer)  # the peer's message
        torch.cuda.current_stream().wait_stream(receives[-1].streams[0])
    torch.cuda.synchronize()
    return time.monotonic() - began


def _detector() -> Result:
    """Measures when the HangDetector reports a receive that a cold launch waits for as well."""
    reported: list[float] = []
    x = torch.rand(64, 64, device="cuda")
    with WaitingKernels(2 * _HOLD) as waiting:
        began = time.monotonic()
        detector = _watch(
            waiting.streams[0],
            lambda error: reported.append(time.monotonic() - began),
        )
        torch.copysign(x, x)  # cold
        launched = time.monotonic() - began
        while not reported and not waiting.is_released:
            time.sleep(0.01)
        detector.close()
    return {"reported": reported[0] if reported else None, "launched": launched, "hold": 2 * _HOLD}


def _watch(stream: torch.cuda.Stream, on_hang: Callable[[Exception], None]) -> HangDetector:
    """Watches the work of `stream` as a message that may take 0.3 s, as a communicator does."""
    device = torch.device("cuda", torch.cuda.current_device())
    detector = HangDetector(limit=_DETECTOR_LIMIT, on_hang=on_hang, device=device)
    with torch.cuda.stream(stream):
        event = compute_event(device)
    detector.watch("receive of the spin lab", lambda: event)
    return detector


def _allocator() -> Result:
    """Allocates 1 GiB where the process may have 2 GiB and a waiting stream uses 1.5 of them.

    The 1.5 GiB are recorded (`record_stream`) and freed, or held by a reference.
    """
    properties = torch.cuda.get_device_properties(0)
    results: Result = {"hold": _HOLD}
    for how in ("recorded", "held"):
        torch.cuda.empty_cache()
        allowed = torch.cuda.memory_reserved() + 2 * _GIB
        torch.cuda.set_per_process_memory_fraction(allowed / properties.total_memory)
        block = [torch.empty(3 * _GIB // 2, dtype=torch.uint8, device="cuda")]
        with WaitingKernels(_HOLD) as waiting:
            if how == "recorded":
                block.pop().record_stream(waiting.streams[0])
            began = time.monotonic()
            try:
                torch.empty(_GIB, dtype=torch.uint8, device="cuda")
                outcome = "memory"
            except torch.OutOfMemoryError:
                outcome = "out of memory"
            results[how] = {"seconds": time.monotonic() - began, "outcome": outcome}
        block.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    return results


def _theft() -> Result:
    """Measures a matmul beside waiting blocks, in milliseconds."""
    a = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(4096, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def matmul() -> None:
        torch.mm(a, b, out=out)

    device = a.device
    times: Result = {"0": time_calls(matmul, device, inner=8, warmup=8).median}
    for blocks in _BLOCKS:
        with WaitingKernels(2 * _HOLD, blocks=blocks, shared_bytes=_SHARED_BYTES) as waiting:
            time.sleep(0.01)  # the blocks get their SMs
            times[str(blocks)] = _median_while_waiting(matmul, waiting)
    return {"milliseconds": times}


def _median_while_waiting(matmul: Callable[[], object], waiting: WaitingKernels) -> float | None:
    """Returns the median milliseconds; None if the kernels were released during the measurement.

    `time_calls` cannot be used, because it waits until all streams are done.
    """
    times = []
    for _ in range(9):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(8):
            matmul()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / 8)
    return None if waiting.is_released else sorted(times)[len(times) // 2]


def _host_call(name: str, call: Callable[[], object]) -> HostCall:
    """Makes a call while a kernel waits, and measures it and two other threads."""
    event = torch.cuda.Event()
    event.record()
    torch.cuda.synchronize()
    with WaitingKernels(_HOLD) as waiting:
        watches = [_Watch(event.query), _Watch(lambda: None)]
        began, error = time.monotonic(), ""
        try:
            call()
        except Exception as caught:
            error = f"{type(caught).__name__}: {str(caught)[:120]}"
        seconds, held = time.monotonic() - began, waiting.is_released
        query, stopped = (watch.stop() for watch in watches)
    return HostCall(name, seconds, held, query, stopped, error)


class _Watch:
    """A thread that makes a call about every 10 ms, and notes the longest time between two."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._longest = call, 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> float:
        self._end.set()
        self._thread.join()
        return self._longest

    def _run(self) -> None:
        last = time.monotonic()
        while not self._end.wait(0.01):
            self._call()
            now = time.monotonic()
            self._longest = max(self._longest, now - last)
            last = now


def _backward_here(weight: Tensor) -> None:
    with torch.autograd.set_multithreading_enabled(False):
        (weight @ weight).sum().backward()


EXPERIMENTS: dict[str, Callable[[], Result]] = {
    "launches": launches,
    "queues": queues,
    "beside": beside,
}


def main() -> None:
    """Runs the experiment that the command line names, when standard input gives the time limit."""
    experiment = EXPERIMENTS[sys.argv[1]]
    limit = float(sys.stdin.readline())
    faulthandler.dump_traceback_later(max(1.0, limit - 1), exit=True)
    torch.cuda.init()
    disable_cudnn_attention()  # as in training
    load_kernels()
    print(json.dumps(experiment()), flush=True)


if __name__ == "__main__":
    main()
