"""Processes that run a checkout's scripts for same_bits.py: how they start and end.

Importing torch and transformers takes seconds, and same_bits.py starts a hundred scripts.
Therefore the processes are forks of one server, which has imported these libraries but nothing of
the checkout. With `fresh`, each process is a new Python interpreter, as when a user starts it.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

LIBRARIES = (
    "torch.distributed", "torch.nn.attention", "tokenizers", "safetensors.torch",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "bitsandbytes",
    "transformers.models.auto.tokenization_auto", "transformers.tokenization_utils_tokenizers",
    "transformers.models.gptj.modeling_gptj", "transformers.models.gpt_neox.modeling_gpt_neox",
)  # fmt: skip
OTHERS = ("GLOO_", "NCCL_", "WANDB_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_", "TORCHELASTIC_")
OURS = {
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
}  # fmt: skip
TAIL = 15  # lines of each log that are shown after a failure

_server = multiprocessing.get_context("forkserver")


class FailedError(Exception):
    """Error for wrong flags, a process that failed, or a run that did not do what it should."""


class Process(NamedTuple):
    """A process that leads its own process group; `status` returns None while the process runs."""

    pid: int
    status: Callable[[], int | None]


def prepare() -> None:
    """Sets the environment of all later processes; call this before torch is imported."""
    for name in [name for name in os.environ if name.startswith(OTHERS)]:
        del os.environ[name]
    os.environ.pop("PYTHONPATH", None)
    os.environ.update(OURS)
    _server.set_forkserver_preload(list(LIBRARIES))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the exit ends the processes, too


def run_processes(
    commands: Sequence[Sequence[str]],
    folder: Path,
    name: str,
    *,
    deadline: float,
    fresh: bool,
    is_enough: Callable[[], bool] | None = None,
) -> None:
    """Runs one process for each command, and waits until all processes have succeeded.

    The first word of a command is the script; `folder` is the working directory. If `is_enough` is
    given, all processes get SIGKILL as soon as it returns True. Raises FailedError if a process
    fails or runs longer than `deadline` seconds, or if all end before `is_enough` returns True.
    """
    logs = [folder / f"{name}.process{number}.log" for number in range(len(commands))]
    start = _start_fresh if fresh else _start_fork
    processes: list[Process] = []
    try:
        for command, log in zip(commands, logs, strict=True):
            processes.append(start(command, folder, log))
        problem = _wait(processes, time.monotonic() + deadline, is_enough)
    finally:
        for process in processes:
            _end(process)
    if problem is not None:
        tails = [f"{log.name}:\n{_tail(log)}" for log in logs]
        raise FailedError("\n".join([f"{name}: {problem}; the ends of the logs:", *tails]))


def _start_fresh(command: Sequence[str], folder: Path, log: Path) -> Process:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=folder, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    return Process(process.pid, process.poll)


def _start_fork(command: Sequence[str], folder: Path, log: Path) -> Process:
    process = _server.Process(target=_be_script, args=(command, folder, log))
    process.start()
    assert process.pid is not None, "the process has started"
    return Process(process.pid, lambda: process.exitcode)


def _be_script(command: Sequence[str], folder: Path, log: Path) -> None:
    """Executes `python <command>` in `folder`, in this forked process, until the script ends."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(folder)
    ours = Path(__file__).resolve().parent
    for module in [module for module in sys.modules if module.split(".")[0] == ours.name]:
        del sys.modules[module]
    others = [entry for entry in sys.path if Path(entry).resolve() not in (ours, ours.parent)]
    sys.path[:] = [str(Path(command[0]).parent), *others]
    # Each checkout's modules are compiled once; nothing is written into the checkout.
    sys.pycache_prefix, sys.dont_write_bytecode = str(folder / "compiled"), False
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")


def _wait(
    processes: Sequence[Process], end: float, is_enough: Callable[[], bool] | None
) -> str | None:
    """Waits until the processes end or `is_enough` returns True; returns an error text or None."""
    while True:
        statuses = [process.status() for process in processes]
        for number, status in enumerate(statuses):
            if status not in (None, 0):
                return f"process {number} ended with status {status}"
        if is_enough is not None and is_enough():
            return None
        if None not in statuses:
            return None if is_enough is None else "it ended before it could be killed"
        if time.monotonic() > end:
            return "it did not end by its deadline"
        time.sleep(0.02)


def _end(process: Process) -> None:
    """Kills a process and its children if the process still runs."""
    while process.status() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # the fork has no process group yet
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.02)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(lines[-TAIL:])
