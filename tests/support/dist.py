"""Real processes for tests: N ranks with a deadline, and a failed rank's traceback brought back."""

import contextlib
import itertools
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")

_AFTER_FAILURE_SECONDS = 5.0  # how long the others may take to end once a rank has failed


_ports: dict[int, Iterator[int]] = {}  # of each process: forks are not to draw the same


def free_port() -> int:
    """A port on loopback that is free, and that the system gives nobody who asks for just any: it
    is still free for those who meet there later.

    That is one below the ephemeral ports (32768 on); by process, so that two do not meet."""
    pid = os.getpid()
    ports = _ports.setdefault(pid, itertools.cycle(range(20_000 + pid % 100 * 100, 30_100)))
    while True:
        port = next(ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def process_context() -> multiprocessing.context.ForkServerContext:
    """Where processes come from: one server imports all once, and every rank is its fork."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # read when torch is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    return context


def run_ranks(
    world_size: int, function: Callable[..., Result], *args: object, deadline: float = 60.0
) -> list[Result]:
    """Runs `function(rank, world_size, dist_url, *args)` in `world_size` processes.

    `function` must be importable, its arguments and result picklable. Returns the results by rank.

    Raises:
        RuntimeError: a rank raised or died (the traceback is in the text), or some hung past
            `deadline` seconds; all processes are gone by then.
    """
    url = f"tcp://127.0.0.1:{free_port()}"
    context = process_context()
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            place = Path(folder) / str(rank)
            parameters = (place, function, rank, world_size, url, args)
            processes.append(context.Process(target=_rank_main, args=parameters))
            processes[-1].start()
        hung = _await(processes, time.monotonic() + deadline)
        outcomes = [_outcome(Path(folder) / str(r), processes[r]) for r in range(world_size)]
    problems = [f"rank {r}: {problem}" for r, (problem, _) in enumerate(outcomes) if problem]
    if hung:
        problems.insert(0, f"hung: {', '.join(f'rank {rank}' for rank in hung)}")
    if problems:
        raise RuntimeError("\n".join(problems))
    return [result for _, result in outcomes]


def _rank_main(
    place: Path,
    function: Callable[..., object],
    rank: int,
    world_size: int,
    url: str,
    args: tuple[object, ...],
) -> None:
    try:
        outcome = ("", function(rank, world_size, url, *args))
    except BaseException:
        outcome = (traceback.format_exc(), None)
    partial = place.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(outcome))
    partial.rename(place)
    os._exit(1 if outcome[0] else 0)  # a library's thread must not keep a finished rank alive


def _await(processes: list[BaseProcess], deadline: float) -> list[int]:
    """Waits for all, ends those that are left at the deadline, and returns their ranks."""
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_SECONDS)
        time.sleep(0.05)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    return hung


def _outcome(place: Path, process: BaseProcess) -> tuple[str, Any]:
    """The traceback (empty if there is none) and the result of one rank."""
    if not place.exists():
        return f"ended without a result, exit status {process.exitcode}", None
    problem, result = pickle.loads(place.read_bytes())
    return problem, result
