"""Check 7: tokens per second and MFU of one process, beside Hugging Face's model in a plain loop.

Both sides train the same weights on the same batch, one after the other. On a CPU the same code
trains tiny models; there only the losses mean something.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.hugging_face import HuggingFaceLoop
from benchmarks.work import LOSS_TOLERANCE, Contender, Workload
from modules.registry import MODELS
from monitor.out_of_memory import is_out_of_memory
from tests.gpu.report import CheckReport, Options, run_check
from tests.gpu.speed import (
    Speed,
    free_memory,
    measure,
    ours_alone,
    peak_flops,
    top_kernels,
)

PYTHIA = Workload(  # Pythia-1.4B
    split=(24,),
    precision="bf16",
    hidden=2048,
    heads=16,
    inner=8192,
    vocabulary=50_304,
    tokens=2048,
)
GPTJ = Workload(  # GPT-J-6B with fewer blocks
    split=(28,),
    precision="bf16",
    hidden=4096,
    heads=16,
    inner=16_384,
    vocabulary=50_400,
    tokens=2048,
    family="gptj",
)
TINY = Workload(split=(2,), batch=4, hidden=64, heads=4, inner=256, vocabulary=512, tokens=32)
BYTES_PER_PARAMETER = 18  # weight, gradient, master and moments
FOR_ACTIVATIONS = 0.3  # of a GPU's memory
STEPS, KERNELS = 3, 8
NOT_SPEED = "a CPU: no measure of speed"


def check(report: CheckReport, options: Options) -> None:
    device = torch.device("cuda", 0) if options.is_cuda else torch.device("cpu")
    if options.is_cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    end, longest = time.monotonic() + options.limit - 10.0, 0.0
    for number, (name, work) in enumerate(_cases(options, device)):
        began = time.monotonic()
        if began + 1.5 * longest > end:
            report.measure(name, "left out", note="no time is left")
            continue
        _compare(report, name, work, device, profiled=number == 0)
        longest = max(longest, time.monotonic() - began)


def _cases(options: Options, device: torch.device) -> Iterator[tuple[str, Workload]]:
    """Yields the workloads, the most important ones first, because time can run out."""
    if not options.is_cuda:
        yield "tiny GPT-NeoX", TINY
        if not options.quick:
            yield "tiny GPT-NeoX, recompute, 2 rows", TINY.on(recompute="full", micro_batch=2)
            yield "tiny GPT-NeoX, bf16", TINY.on(precision="bf16")
            yield "tiny GPT-J", TINY.on(family="gptj")
        return
    for micro_batch in (1, 8):
        yield f"Pythia-1.4B, {micro_batch} rows", PYTHIA.on(micro_batch=micro_batch)
    blocks = _blocks_that_fit(device)
    yield f"GPT-J-6B, {blocks} blocks, 1 row", GPTJ.on(split=(blocks,))
    for micro_batch in (1, 8):
        work = PYTHIA.on(micro_batch=micro_batch, recompute="full")
        yield f"Pythia-1.4B, recompute, {micro_batch} rows", work


def _blocks_that_fit(device: torch.device) -> int:
    """Returns how many blocks of GPT-J-6B leave room for activations on the GPU; at most 28."""
    free_memory(device)
    free, _ = torch.cuda.mem_get_info(device)
    sizes = MODELS[GPTJ.family].load().sizes(GPTJ.config)
    room = free * (1 - FOR_ACTIVATIONS) - 2 * sizes.head_weights * BYTES_PER_PARAMETER
    return max(1, min(sizes.layers, int(room / (sizes.block_weights * BYTES_PER_PARAMETER))))


def _compare(
    report: CheckReport, name: str, work: Workload, device: torch.device, *, profiled: bool
) -> None:
    """Measures both sides; adds their speeds, their ratio and the comparison of their losses."""
    with _cudnn_attention(False):  # as in training
        speed = _measure_ours(report, name, work, device, profiled=profiled)
    free_memory(device)
    if speed is None:
        return
    theirs = _measure_peer(report, name, work, device)
    free_memory(device)
    falls = speed.losses[-1] < speed.losses[0]
    steps = f"{len(speed.losses)} steps"
    report.expect(f"{name}: the loss falls", falls, speed.losses[-1], "", f"after {steps}")
    if theirs is None:
        return
    _report_speed(report, f"{name}: Hugging Face", theirs, device)
    if device.type == "cuda":
        report.measure(f"{name}: ours / Hugging Face", speed.tokens / theirs.tokens)
    apart = max(abs(a - b) / abs(b) for a, b in zip(speed.losses, theirs.losses, strict=True))
    report.expect(
        f"{name}: losses of Hugging Face's model",
        apart <= LOSS_TOLERANCE[work.precision],
        apart,
        "relative",
        f"{steps}, to {theirs.losses[-1]:.4f}; allowed: {LOSS_TOLERANCE[work.precision]:g}",
    )


def _measure_ours(
    report: CheckReport, name: str, work: Workload, device: torch.device, *, profiled: bool
) -> Speed | None:
    """Measures our side and adds its rows; returns None if the memory does not suffice."""
    try:
        ours: Contender = ours_alone(work, device)
        speed = measure(ours, work, device, steps=STEPS)
        _report_speed(report, f"{name}: ours", speed, device)
        if profiled:
            for kernel, milliseconds, share in top_kernels(ours, device, KERNELS):
                report.measure(f"  {kernel[:52]}", milliseconds, "ms", f"{share:.1%} of a step")
        return speed
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        report.measure(f"{name}: ours", "out of memory")
        return None


def _measure_peer(
    report: CheckReport, name: str, work: Workload, device: torch.device
) -> Speed | None:
    """Measures Hugging Face's model; returns None if the memory does not suffice."""
    try:
        return measure(HuggingFaceLoop(work, device), work, device, steps=STEPS)
    except torch.OutOfMemoryError:
        report.measure(f"{name}: Hugging Face", "out of memory")
        return None


@contextmanager
def _cudnn_attention(enabled: bool) -> Iterator[None]:
    """Permits or forbids cuDNN's attention in the `with` block."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(enabled)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _report_speed(report: CheckReport, name: str, speed: Speed, device: torch.device) -> None:
    if device.type != "cuda":
        report.measure(name, speed.tokens, "tokens/s", NOT_SPEED)
        return
    peak = peak_flops(device)
    mfu = "MFU unknown: no peak of this GPU" if peak is None else f"MFU {speed.flops / peak:.1%}"
    note = f"{speed.flops / 1e12:.0f} TFLOP/s, {mfu}, peak {speed.peak_bytes / 2**30:.1f} GiB"
    report.measure(name, speed.tokens, "tokens/s", note)


if __name__ == "__main__":
    run_check(check)
