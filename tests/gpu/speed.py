"""Speed of one process that trains: tokens per second, FLOP/s, and the kernels of a step."""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.ours import Ours
from benchmarks.work import Contender, Workload
from comm.backends.single_process import SingleProcessCommunicator
from comm.process_groups import ProcessGroups
from comm.topology import Topology
from common.tensors import synchronize
from modules.registry import MODELS

WARM_UP = 2
# FLOP/s of dense bf16 matmuls, from NVIDIA's data sheets, by a part of the device's name.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class Speed:
    """Measurements of one side: tokens and FLOP per second, peak bytes, and the loss of each step.

    The FLOP are those of the model; recomputation does not count.
    """

    tokens: float
    flops: float
    peak_bytes: int
    losses: list[float]


def ours_alone(work: Workload, device: torch.device) -> Ours:
    """Returns our training loop in one process."""
    alone = SingleProcessCommunicator()
    groups = ProcessGroups(alone, alone, alone)
    return Ours(work, "1f1b", Topology(0, 1, 1), groups, traced=False, device=device)


def measure(side: Contender, work: Workload, device: torch.device, *, steps: int) -> Speed:
    """Measures `steps` steps after a warm-up; the speed is that of the median step."""
    losses, seconds = [side.step() for _ in range(WARM_UP)], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(steps):
        synchronize(device)
        start = time.perf_counter()
        losses.append(side.step())
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    tokens = work.batch * work.tokens / median(seconds)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Speed(tokens, tokens * flops_per_token(work), peak, losses)


def flops_per_token(work: Workload) -> float:
    """Returns the model's FLOP of training on one token; backward has twice those of forward."""
    module = MODELS[work.family].load().sizes(work.config).work(work.tokens)
    return 6.0 * (work.layers * module.block + module.head)


def peak_flops(device: torch.device) -> float | None:
    """Returns the GPU's FLOP/s by its data sheet; None for another device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def top_kernels(
    side: Contender, device: torch.device, count: int
) -> Iterator[tuple[str, float, float]]:
    """Profiles one step; yields name, milliseconds and share of the `count` longest kernels.

    On a CPU these are operators in place of kernels.
    """
    is_cuda = device.type == "cuda"
    activity = ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        side.step()
        synchronize(device)
    times = {
        event.key: event.self_device_time_total if is_cuda else event.self_cpu_time_total
        for event in profiled.key_averages()
    }
    total = sum(times.values()) or 1.0
    for name in sorted(times, key=lambda name: -times[name])[:count]:
        yield name, times[name] / 1e3, times[name] / total


def free_memory(device: torch.device) -> None:
    """Returns the memory of deleted models to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
