"""Benchmark of our pipeline and torch.distributed.pipelining: same work, in turns, in one run.

    python benchmarks/pipeline.py [--case fp32 --case bf16 ...] [--rounds 7]

Two processes, with one thread each, together train a GPT-NeoX (hidden 512, 8 layers, vocabulary
8192, blocks of 256 tokens) with AdamW and clipping. benchmarks/README.md explains the tables.
"""

import argparse
import math
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
from benchmarks.work import LOSS_TOLERANCE, Contender
from comm.process_groups import ProcessGroups
from comm.topology import Topology
from modules.matmul.backend import Matmul, choose_matmul, use_matmul
from modules.matmul.cpu_info import CpuInfo


@dataclass(frozen=True)
class Result:
    """Measurements of a contender: seconds and loss per round, and peak bytes per process.

    overhead: measured / simulated step time; NaN for the peer.
    """

    name: str
    seconds: list[float]
    losses: list[float]
    peak_bytes: list[int]
    overhead: float


class Pair:
    """The two processes of one measurement, each connected to this process by a pipe."""

    def __init__(self, main: Callable[..., None], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self._pipes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            context.Process(target=main, args=(theirs, rank, port, *arguments), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def ask(self, question: str) -> list[Any]:
        """Asks both processes, and returns their answers; exits if a process has died."""
        for pipe in self._pipes:
            pipe.send(question)
        return self.answers()

    def answers(self) -> list[Any]:
        try:
            return [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise SystemExit(1) from None


def run_case(case: Case, rounds: int, matmul: Matmul) -> tuple[list[Result], float]:
    """Runs the contenders for `rounds` rounds after one warm-up round.

    `matmul` is the backend of contenders that name no backend. Returns the results, and the seconds
    that one process needs for forward and backward of a microbatch through the complete model.
    """
    alone = max(Pair(_measure_alone, case.name, matmul).answers())
    pairs = {
        entry.name: Pair(_contend, case.name, entry.name, entry.matmul or matmul)
        for entry in case.entries
    }
    for pair in pairs.values():
        pair.answers()  # the pair is ready and waits for its turn
    measured: dict[str, list[list[Any]]] = {name: [] for name in pairs}
    names = list(pairs)
    for turn in range(1 + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(pairs[name].ask("step"))
    return [_result(name, measured[name], pair.ask("end")) for name, pair in pairs.items()], alone


def _measure_alone(pipe: Connection, rank: int, port: int, case_name: str, matmul: Matmul) -> None:
    """Measures one microbatch while the other process does the same work; sends the seconds."""
    torch.set_num_threads(1)
    use_matmul(matmul)
    groups, close = meet(Topology(rank, 1, 2), port)
    groups.control.all_gather(torch.zeros(1))
    pipe.send(one_process_seconds(CASES[case_name].work))
    close()


def _contend(
    pipe: Connection, rank: int, port: int, case_name: str, name: str, matmul: Matmul
) -> None:
    """Makes a step of a contender at each request; at the end, sends peak memory and overhead."""
    torch.set_num_threads(1)
    use_matmul(matmul)
    case = CASES[case_name]
    topology = Topology(rank, *case.shape)
    groups, close = meet(topology, port)
    (entry,) = (entry for entry in case.entries if entry.name == name)
    contender = entry.make(topology, groups)
    pipe.send("ready")
    while pipe.recv() == "step":
        pipe.send(_timed(contender, groups))
    pipe.send((_peak_bytes(), contender.overhead() if isinstance(contender, Ours) else math.nan))
    close()


def _peak_bytes() -> int:
    """Returns the peak memory in bytes; the value of getrusage would include the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (one for one in lines if one.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def _timed(contender: Contender, groups: ProcessGroups) -> tuple[float, float]:
    groups.control.all_gather(torch.zeros(1))
    start = time.perf_counter()
    loss = contender.step()
    return time.perf_counter() - start, loss


def _result(name: str, steps: Sequence[Sequence[Any]], end: Sequence[Any]) -> Result:
    """Returns a contender's result: seconds of the slower process, and losses of the last rank."""
    return Result(
        name,
        [max(seconds for seconds, _ in pair) for pair in steps][1:],
        [pair[-1][1] for pair in steps],
        [peak for peak, _ in end],
        end[0][1],
    )


def report(case: Case, results: list[Result], alone: float) -> None:
    """Prints the table of a case: step times, also relative to the bound that README.md defines."""
    by_name = {result.name: result for result in results}
    (stages, replicas), m = case.shape, case.work.batch
    tokens = m * case.work.tokens * replicas
    bound = alone * (m + stages - 1) / stages
    print(f"\n{case.title}")
    columns = {
        "s/step": 8,
        "tokens/s": 10,
        "spread": 8,
        "of bound": 10,
        "/ simulated": 13,
        "peak MB": 12,
    }
    print(f"  {'':22s}" + "".join(f"{name:>{width}s}" for name, width in columns.items()))
    for result in results:
        middle = median(result.seconds)
        spread = (max(result.seconds) - min(result.seconds)) / middle
        print(
            f"  {result.name:22s}{middle:8.3f}{tokens / middle:10.0f}{spread:8.1%}"
            f"{bound / middle:10.1%}{result.overhead:13.3f}".replace("nan", "   ")
            + f"{'  '.join(f'{peak / 2**20:.0f}' for peak in result.peak_bytes):>12s}"
        )
    for ours, theirs in case.ratios:
        pairs = zip(by_name[ours].seconds, by_name[theirs].seconds, strict=True)
        each = [their / our for our, their in pairs]
        ratio = median(by_name[theirs].seconds) / median(by_name[ours].seconds)
        print(f"  {ours} / {theirs}: {ratio:.3f} ({min(each):.3f} to {max(each):.3f})")
    _check_losses(case, results)


def _check_losses(case: Case, results: list[Result]) -> None:
    first = results[0]
    apart = [
        abs(a - b) / abs(b)
        for result in results[1:]
        for a, b in zip(result.losses, first.losses, strict=True)
    ]
    worst, allowed = max(apart), LOSS_TOLERANCE[case.work.precision]
    verdict = "agree" if all(each < allowed for each in apart) else "DO NOT AGREE"  # NaN: disagree
    print(
        f"  losses {verdict}: {worst:.1e} apart over {len(first.losses)} updates "
        f"({first.losses[0]:.4f} to {first.losses[-1]:.4f})"
    )
    if verdict != "agree":
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=list(CASES), action="append", help="default: all cases")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--cpu-matmul",
        choices=("auto", "default", "onednn"),
        default="auto",
        help="backend of fp32 matmuls on both sides",
    )
    args = parser.parse_args()
    auto = choose_matmul(CpuInfo.of_this_machine())
    matmul = auto if args.cpu_matmul == "auto" else args.cpu_matmul
    print(f"{describe_machine()}\nfp32 matmul backend of both sides: {matmul}")
    for name in args.case or list(CASES):
        report(CASES[name], *run_case(CASES[name], args.rounds, matmul))


if __name__ == "__main__":
    main()
