"""Launcher of the processes of a test; tests.support.runs uses it to start whole runs.

A process is a fork of a server that has imported all modules (tests.support.preloaded), or a fork
of such a fork. A test that checks how the program starts gets a new Python process, and so does a
check on a GPU (`use_new_interpreters`). The output of a process goes to files. A process is killed
if its parent process dies.
"""

import contextlib
import ctypes
import fcntl
import functools
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1
_AFTER_FAILURE_SECONDS = 5.0  # for the other ranks, after a rank failed
_TICK_SECONDS = 0.02
_ports: dict[int, Iterator[int]] = {}  # by process: forks must draw different ports
_is_fork = False  # whether this process is a fork of the server
_forks = True  # whether this process starts forks; False: new interpreters
_preloaded: tuple[str, ...] = ("tests.support.preloaded",)  # the modules that the server imports


def is_fork() -> bool:
    """Returns whether this process is a fork of the server."""
    return _is_fork


def use_new_interpreters() -> None:
    """Makes this process start new Python interpreters in place of forks.

    A check on a GPU needs this: a fork gets torch and libraries of CUDA already loaded, so
    environment variables that these libraries read while they are loaded come too late.
    """
    global _forks
    _forks = False


def preload(*modules: str) -> None:
    """Makes the server import only `modules`; call this before the first process is started."""
    global _preloaded
    _preloaded = modules


class Process:
    """A started process; the path `place` plus .out or .err is the file of its stdout or stderr."""

    def __init__(self, process: "BaseProcess | subprocess.Popen[bytes]", place: Path) -> None:
        self._process, self._place = process, place
        assert process.pid is not None
        self.pid: int = process.pid
        self.ready = place.with_name(f"{place.name}.ready")

    @property
    def stderr(self) -> str:
        return self._place.with_name(f"{self._place.name}.err").read_text()

    @property
    def stdout(self) -> str:
        return self._place.with_name(f"{self._place.name}.out").read_text()

    @property
    def lines(self) -> list[str]:
        return self.stderr.splitlines()

    def status(self, *, within: float = 0.0) -> int | None:
        """Returns the exit status; None if the process still runs after `within` seconds."""
        deadline = time.monotonic() + within
        while (status := self._poll()) is None and time.monotonic() < deadline:
            time.sleep(_TICK_SECONDS)
        return status

    def kill(self) -> None:
        """Kills the process if it still runs."""
        if self._poll() is None:
            self._process.kill()
            self.status(within=10.0)

    def _poll(self) -> int | None:
        if isinstance(self._process, BaseProcess):
            return self._process.exitcode
        return self._process.poll()


Launch = Callable[..., Process]  # of a function and its arguments


def free_port() -> int:
    """Returns a free port on loopback, below the ports that the system itself chooses (from 32768).

    This process reserves the port until it ends: it locks the byte of that number in a file that
    all test processes share, so no other test process gets the port before it is used.
    """
    pid = os.getpid()
    ports = _ports.setdefault(pid, itertools.cycle(range(20_000 + pid % 100 * 100, 30_100)))
    while True:
        port = next(ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            fcntl.lockf(_reservations(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
            probe.bind(("127.0.0.1", port))
            return port


@functools.cache
def _reservations() -> IO[bytes]:
    """Returns the file of the reserved ports. Closing it would end all locks of this process."""
    return Path(tempfile.gettempdir(), f"dist-clm-test-ports-{os.getuid()}").open("ab")


def fork(place: Path, function: Callable[..., object], *args: object) -> Process:
    """Calls `function(*args)` in a fork; a caller that is no fork must give picklable objects."""
    process = _make_process(_live, place, function, args)
    for end in (".out", ".err"):
        place.with_name(place.name + end).write_bytes(b"")
    process.start()
    return Process(process, place)


def _make_process(target: Callable[..., object], *args: object) -> BaseProcess:
    if _is_fork:
        return multiprocessing.get_context("fork").Process(target=target, args=args)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as setup_logging does before torch
    if not _forks:
        return multiprocessing.get_context("spawn").Process(target=target, args=args)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(_preloaded))
    return server.Process(target=target, args=args)


def spawn(place: Path, script: Path, argv: Sequence[str], environ: Mapping[str, str]) -> Process:
    """Starts a Python script as a user does; its working directory is the folder of `place`."""
    files = [place.with_name(place.name + end).open("wb") for end in (".out", ".err")]
    with files[0] as out, files[1] as err:
        process = subprocess.Popen(
            [sys.executable, str(script), *argv],
            cwd=place.parent,
            env=environ,
            stdout=out,
            stderr=err,
            preexec_fn=_die_with_parent,
        )
    return Process(process, place)


def start(folder: Path, name: str, function: Callable[..., object], *args: object) -> Process:
    """Calls `function(ready, *args)` in a fork; when ready, the function creates the file `ready`.

    If the function raises a ValueError or an OSError, the fork writes the error's text to stderr.
    Then it exits as dist_clm_train.py does, with status 2 for ValueError and 1 for OSError.
    """
    place = folder / name
    return fork(place, _report_errors, function, place.with_name(f"{name}.ready"), *args)


def await_ready(processes: Iterable[Process], *, within: float = 40.0) -> None:
    deadline = time.monotonic() + within
    while not all(process.ready.exists() for process in processes):
        assert time.monotonic() < deadline, [process.lines for process in processes]
        time.sleep(_TICK_SECONDS)


def run_ranks(
    world_size: int, function: Callable[..., Result], *args: object, deadline: float = 60.0
) -> list[Result]:
    """Calls `function(rank, world_size, dist_url, *args)` in `world_size` processes.

    `function` must be importable, and its arguments and result must be picklable. Returns a list
    with the result of each rank.

    Raises:
        RuntimeError: a rank raised or died (the text has its traceback), or a rank still ran after
            `deadline` seconds. All processes have ended before the error is raised.
    """
    url = f"tcp://127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(rank) for rank in range(world_size)]
        processes = [
            fork(place, _store_result, place, function, rank, world_size, url, *args)
            for rank, place in enumerate(places)
        ]
        hung = _await(processes, time.monotonic() + deadline)
        results = [_result(*both) for both in zip(places, processes, strict=True)]
    problems = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(results) if problem]
    if hung:
        problems.insert(0, f"hung: {', '.join(f'rank {rank}' for rank in hung)}")
    if problems:
        raise RuntimeError("\n".join(problems))
    return [result for _, result in results]


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _live(place: Path, function: Callable[..., object], args: tuple[object, ...]) -> NoReturn:
    """Calls `function(*args)`; ends this fork with the exit status that a script would have."""
    global _is_fork
    status = 1
    try:
        _die_with_parent()
        alive = forkserver._forkserver._forkserver_alive_fd  # type: ignore[attr-defined]
        if alive is not None and not _is_fork:  # closed here: only the test process may keep the
            os.close(alive)  # server alive
        _is_fork = True
        for descriptor, end in ((1, ".out"), (2, ".err")):
            path = place.with_name(place.name + end)
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        status = _status_of(function, args)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # a library's thread must not keep the process alive


def _status_of(function: Callable[..., object], args: tuple[object, ...]) -> int:
    try:
        function(*args)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _report_errors(function: Callable[..., object], *args: object) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        function(*args)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2 if isinstance(error, ValueError) else 1)


def _store_result(place: Path, function: Callable[..., object], *args: object) -> None:
    place.write_bytes(pickle.dumps(function(*args)))


def _await(processes: Sequence[Process], deadline: float) -> list[int]:
    """Waits for all processes, kills those that run at the deadline, and returns their ranks."""
    while (running := [p for p in processes if p.status() is None]) and time.monotonic() < deadline:
        if any(process.status() for process in processes):
            deadline = min(deadline, time.monotonic() + _AFTER_FAILURE_SECONDS)
        time.sleep(_TICK_SECONDS)
    for process in running:
        process.kill()
    return [rank for rank, process in enumerate(processes) if process in running]


def _result(place: Path, process: Process) -> tuple[str, Any]:
    """Returns the problem of a rank (empty if there is none) and the rank's result."""
    status = process.status()
    if status == 0 and place.exists():
        return "", pickle.loads(place.read_bytes())
    return f"ended without a result, exit status {status}: {process.stderr}", None
