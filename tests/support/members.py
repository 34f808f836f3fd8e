"""Ranks that are expected to fail: real processes whose exit status and stderr are looked at."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from comm.communicator import PeerLostError
from comm.liveness.failure_policy import ExitPolicy
from tests.support.connected import Rank, enter
from tests.support.dist import process_context

RankProgram = Callable[[Rank], None]


@dataclass(frozen=True)
class Process:
    """One process, its stderr in a file, and a file that it makes when it has come far enough."""

    process: BaseProcess
    stderr: Path
    ready: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def lines(self) -> list[str]:
        return self.stderr.read_text().splitlines()

    def status(self, *, within: float) -> int | None:
        """The exit status; None where it is still running after `within` seconds."""
        self.process.join(within)
        return self.process.exitcode


def start(folder: Path, name: str, function: Callable[..., object], *args: object) -> Process:
    """Runs `function(ready, *args)` with its stderr in `folder`."""
    stderr, ready = folder / f"{name}.err", folder / f"{name}.ready"
    process = process_context().Process(target=_main, args=(stderr, ready, function, args))
    process.start()
    return Process(process, stderr, ready)


def await_ready(processes: list[Process], *, within: float = 40.0) -> None:
    deadline = time.monotonic() + within
    while not all(process.ready.exists() for process in processes):
        assert time.monotonic() < deadline, [process.lines for process in processes]
        time.sleep(0.02)


def _main(
    stderr: Path, ready: Path, function: Callable[..., object], args: tuple[object, ...]
) -> None:
    descriptor = os.open(stderr, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        function(ready, *args)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(2)
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        os._exit(1)


def member(
    ready: Path,
    rank: int,
    url: str,
    shape: tuple[int, int],
    program: RankProgram,
    dist_timeout: float,
) -> None:
    """Enters a run and does what `program` says, as the entry script would; ready is who waits for
    another in it."""
    entered = enter(
        rank, url, num_stages=shape[0], num_replicas=shape[1], dist_timeout=dist_timeout
    )
    entered.groups.control.all_reduce(torch.ones(1)).wait()
    threading.Thread(target=_await_waiting, args=(entered.policy, ready), daemon=True).start()
    try:
        program(entered)
    except PeerLostError as error:
        entered.policy.operation_failed(error)
    entered.close()


def _await_waiting(policy: ExitPolicy, ready: Path) -> None:
    before = policy.operation.text
    while policy.operation.text == before:
        time.sleep(0.001)
    ready.touch()
