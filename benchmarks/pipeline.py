"""Our pipeline beside torch.distributed.pipelining: the same work, interleaved, in one run.

    python benchmarks/pipeline.py [--case fp32 --case bf16 ...] [--rounds 7]

Two processes of one thread each train a GPT-NeoX (hidden 512, 8 layers, vocabulary 8192, blocks of
256 tokens) with AdamW and clipping. benchmarks/README.md says how to read the tables.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from benchmarks.cases import CASES, Case
from benchmarks.machine import describe_machine, one_process_seconds
from benchmarks.meeting import meet
from benchmarks.ours import Ours
from benchmarks.work import Contender
from comm.fabric import Fabric
from comm.topology import Topology
from modules.processor import Processor
from modules.products import Matmul, choose_matmul, use_matmul

LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # bf16: two sides round at other places


@dataclass(frozen=True)
class Result:
    """Seconds and losses of each round of a contender, and the peak memory of each process.

    overhead: measured steps over simulated ones; NaN for the other side.
    """

    name: str
    seconds: list[float]
    losses: list[float]
    peak_bytes: list[int]
    overhead: float


def run_case(
    case: Case, rounds: int, matmul: Matmul, *, only: str | None = None
) -> tuple[list[Result], float]:
    """The contenders (or `only` one) over `rounds` rounds, after one that warms up, and one
    process's seconds for forward and backward of a microbatch through the whole model.

    `matmul` multiplies for all that do not name their own.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
        probe.close()
        arguments = [(rank, port, case.name, rounds, matmul, only, folder) for rank in range(2)]
        processes = [context.Process(target=_process, args=each) for each in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise SystemExit(1)
        parts = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]
    return _join(parts), max(part["alone"] for part in parts)


def _process(
    rank: int,
    port: int,
    case_name: str,
    rounds: int,
    matmul: Matmul,
    only: str | None,
    folder: str,
) -> None:
    torch.set_num_threads(1)
    use_matmul(matmul)
    case = CASES[case_name]
    topology = Topology(rank, *case.shape)
    fabric, close = meet(topology, port)
    alone = 0.0 if only else one_process_seconds(case.work)
    entries = [entry for entry in case.entries if only in (None, entry.name)]
    contenders = {entry.name: entry.make(topology, fabric) for entry in entries}
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(1 + rounds):
        first = turn % len(entries)
        for entry in entries[first:] + entries[:first]:
            use_matmul(entry.matmul or matmul)
            measured[entry.name].append(_timed(contenders[entry.name], fabric))
    overheads = {n: one.overhead() for n, one in contenders.items() if isinstance(one, Ours)}
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {"alone": alone, "measured": measured, "peak": peak, "overheads": overheads}
    torch.save(result, Path(folder) / f"{rank}.pt")
    close()


def _timed(contender: Contender, fabric: Fabric) -> tuple[float, float]:
    fabric.control.all_gather(torch.zeros(1))
    start = time.perf_counter()
    loss = contender.step()
    return time.perf_counter() - start, loss


def _join(parts: Sequence[dict[str, Any]]) -> list[Result]:
    """A step lasts as long as on the slower process; the loss is known to the last one."""
    results = []
    for name in parts[0]["measured"]:
        pairs = list(zip(*(part["measured"][name] for part in parts), strict=True))
        results.append(
            Result(
                name,
                [max(seconds for seconds, _ in pair) for pair in pairs][1:],
                [pair[-1][1] for pair in pairs],
                [part["peak"] for part in parts],
                parts[0]["overheads"].get(name, math.nan),
            )
        )
    return results


def report(case: Case, results: list[Result], alone: float) -> None:
    """The case's table: medians, and how far from the bound (see README.md)."""
    by_name = {result.name: result for result in results}
    (stages, replicas), m = case.shape, case.work.batch
    tokens = m * case.work.tokens * replicas
    bound = alone * (m + stages - 1) / stages
    print(f"\n{case.title}")
    columns = f"{'s/step':>8s}{'tokens/s':>10s}{'spread':>8s}{'of bound':>10s}{'/ simulated':>13s}"
    print(f"  {'':22s}{columns}")
    for result in results:
        middle = median(result.seconds)
        spread = (max(result.seconds) - min(result.seconds)) / middle
        print(
            f"  {result.name:22s}{middle:8.3f}{tokens / middle:10.0f}{spread:8.1%}"
            f"{bound / middle:10.1%}{result.overhead:13.3f}".replace("nan", "   ")
        )
    for ours, theirs in case.ratios:
        pairs = zip(by_name[ours].seconds, by_name[theirs].seconds, strict=True)
        each = [their / our for our, their in pairs]
        ratio = median(by_name[theirs].seconds) / median(by_name[ours].seconds)
        print(f"  {ours} / {theirs}: {ratio:.3f} ({min(each):.3f} to {max(each):.3f})")
    _check_losses(case, results)


def report_memory(case: Case, matmul: Matmul) -> None:
    """The peak memory of each process when a contender runs alone."""
    print(f"\npeak memory (VmHWM, MB) of each process: {case.title}")
    for entry in case.entries:
        results, _ = run_case(case, 1, matmul, only=entry.name)
        peaks = "".join(f"{peak / 2**20:8.0f}" for peak in results[0].peak_bytes)
        print(f"  {entry.name:22s}{peaks}", flush=True)


def _check_losses(case: Case, results: list[Result]) -> None:
    first = results[0]
    worst = max(
        abs(a - b) / abs(b)
        for result in results[1:]
        for a, b in zip(result.losses, first.losses, strict=True)
    )
    verdict = "agree" if worst < LOSS_TOLERANCE[case.work.precision] else "DO NOT AGREE"
    print(f"  losses {verdict}: {worst:.1e} apart over {len(first.losses)} updates "
          f"({first.losses[0]:.4f} to {first.losses[-1]:.4f})")  # fmt: skip
    if verdict != "agree":
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), action="append", help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu-matmul", choices=("auto", "default", "onednn"), default="auto",
                        help="what multiplies fp32 matrices on both sides")  # fmt: skip
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    args = parser.parse_args()
    auto = choose_matmul(Processor.of_this_machine())
    matmul = auto if args.cpu_matmul == "auto" else args.cpu_matmul
    print(f"{describe_machine()}\nfp32 products of both sides: {matmul}")
    for name in args.case or list(CASES):
        if args.memory:
            report_memory(CASES[name], matmul)
            continue
        report(CASES[name], *run_case(CASES[name], args.rounds, matmul))


if __name__ == "__main__":
    main()
