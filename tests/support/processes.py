"""Ranks of dist_clm_train.py that get a signal at a chosen moment, and how all end.

A process that has imported all (tests.support.preloaded) forks the ranks, which do what
`python dist_clm_train.py` would; where the import itself is the moment, or for the proof that it is
the same, the ranks are started as a user starts them.
"""

import ctypes
import importlib
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch

from tests.support.forked import WRITE, output, redirect, status_of
from tests.support.hosts import enter_host

_SCRIPT = Path(__file__).parents[2] / "dist_clm_train.py"
_PR_SET_PDEATHSIG = 1
_HEARD_SECONDS = 0.3  # until a signal that does not kill has been heard


# Called all the time, with the ranks' process ids and the statuses of those that have ended.
Attendant = Callable[[Sequence[int], Mapping[int, "int | None"]], None]


class Armed(Protocol):
    """What a rank's process does to itself before it begins."""

    @property
    def rank(self) -> int:
        """Whose process it is for."""

    def arm(self) -> None:
        """Called once, in that process."""


def find(target: str) -> tuple[Any, str]:
    """What has `module:function` or `module:Class.method` as an attribute, and its name."""
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


@dataclass(frozen=True)
class Kill:
    """A signal to one rank at its `nth` call of `module:function` or `module:Class.method`.

    when: `before` or `after` the call; `half`, of torch.save alone: with half of the file written.
    about: only calls count whose first two arguments have this text in them.
    wait: seconds that the rank rests before it dies, for the others to go on meanwhile.
    seen: instead of all that, for a kill from outside: whether the process (pid) is there yet.
    signals: what it gets, one `wait` after the other; it goes on after those that it survives.
    to_all: every rank gets them, as where a terminal sends them.
    """

    moment: str
    rank: int
    target: str = ""
    when: str = "before"
    nth: int = 1
    about: str = ""
    wait: float = 0.0
    seen: Callable[[int], bool] | None = None
    signals: Sequence[int] = (signal.SIGKILL,)
    to_all: bool = False

    def arm(self) -> None:
        """From here on this process gets the signals at the moment."""
        owner, name = find(self.target)
        original, calls = getattr(owner, name), itertools.count(1)

        def armed(*args: Any, **kwargs: Any) -> Any:
            hit = self.about in str(args[:2]) and next(calls) == self.nth
            if hit and self.when == "half":
                _write_half(original, *args)
            if hit and self.when != "after":
                self._strike()
            result = original(*args, **kwargs)
            if hit and self.when == "after":
                self._strike()
            return result

        setattr(owner, name, armed)

    def _strike(self) -> None:
        for number in self.signals:
            time.sleep(self.wait)
            (os.killpg if self.to_all else os.kill)(0 if self.to_all else os.getpid(), number)
        time.sleep(_HEARD_SECONDS)


def _write_half(save: Callable[[Any, Any], None], state: Any, file: Any) -> None:
    buffer = io.BytesIO()
    save(state, buffer)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()


@dataclass(frozen=True)
class Slow:
    """A rank whose every call of `module:function` or `module:Class.method` takes longer."""

    rank: int
    target: str
    seconds: float

    def arm(self) -> None:
        owner, name = find(self.target)
        original = getattr(owner, name)

        def armed(*args: Any, **kwargs: Any) -> Any:
            time.sleep(self.seconds)
            return original(*args, **kwargs)

        setattr(owner, name, armed)


@dataclass(frozen=True)
class Outcome:
    """How all ranks of one start ended.

    statuses: by rank; negative for a signal, None for one that had to be ended.
    lines, told: what each rank wrote on stderr and on stdout.
    seconds: from the end of the first rank to the end of the last.
    """

    statuses: list[int | None]
    lines: list[list[str]]
    told: list[list[str]]
    seconds: float


def _let_go(pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
    """A rank that was stopped (SIGSTOP) goes on once all others have ended."""
    left = set(range(len(pids))) - ended.keys()
    if len(left) == 1:
        os.kill(pids[left.pop()], signal.SIGCONT)


def fork_ranks(
    argvs: Sequence[Sequence[str]],
    folder: Path,
    *,
    kills: Sequence[Armed] = (),
    seconds: float = 90.0,
    attend: Attendant = _let_go,
    hosts: Sequence[str] | None = None,
) -> Outcome:
    """Runs all ranks to their ends, which `kills` or `attend` may bring about.

    `hosts` are the names of the made-up machines (tests.support.hosts) that the ranks are on.
    """

    group: list[int] = []  # a process group of their own, for `to_all`

    def start(rank: int) -> int:
        pid = os.fork()
        if pid == 0:
            mine = [kill for kill in kills if kill.rank == rank]
            host = None if hosts is None else hosts[rank]
            _be_rank(argvs[rank], folder / f"rank{rank}", mine, host)
        group.append(pid)
        os.setpgid(pid, group[0])
        return pid

    return _await_all(start, len(argvs), folder, seconds=seconds, attend=attend)


def spawn_ranks(
    argvs: Sequence[Sequence[str]],
    folder: Path,
    *,
    kill: Kill | None = None,
    seconds: float = 180.0,
) -> Outcome:
    """As `fork_ranks`, of `python dist_clm_train.py`; the kill comes from outside."""

    def attend(pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
        if kill and kill.seen and kill.rank not in ended and kill.seen(pids[kill.rank]):
            os.kill(pids[kill.rank], signal.SIGKILL)

    def start(rank: int) -> int:
        place = folder / f"rank{rank}"
        files = [
            (os.POSIX_SPAWN_OPEN, descriptor, str(output(place, end)), WRITE, 0o644)
            for descriptor, end in ((1, ".out"), (2, ".err"))
        ]
        command = [sys.executable, str(_SCRIPT), *argvs[rank]]
        return os.posix_spawn(sys.executable, command, _environ(), file_actions=files)

    return _await_all(start, len(argvs), folder, seconds=seconds, attend=attend)


def imports_torch(pid: int) -> bool:
    """Whether the process has mapped torch's library: it is importing, or has."""
    try:
        return b"libtorch_cpu" in Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return False


def _await_all(
    start: Callable[[int], int],
    count: int,
    folder: Path,
    *,
    seconds: float,
    attend: Attendant,
) -> Outcome:
    pids: list[int] = []
    ends: dict[int, tuple[int | None, float]] = {}
    try:
        pids += map(start, range(count))
        deadline = time.monotonic() + seconds
        while len(ends) < count and time.monotonic() < deadline:
            attend(pids, {rank: status for rank, (status, _) in ends.items()})
            _reap(pids, ends, os.WNOHANG)
            time.sleep(0.01)
    finally:
        for rank in set(range(len(pids))) - ends.keys():
            os.kill(pids[rank], signal.SIGKILL)
            os.waitpid(pids[rank], 0)
            ends[rank] = (None, time.monotonic())
    times = [ended for _, ended in ends.values()]
    places = [folder / f"rank{rank}" for rank in range(count)]
    return Outcome(
        [ends[rank][0] for rank in range(count)],
        [output(place, ".err").read_text().splitlines() for place in places],
        [output(place, ".out").read_text().splitlines() for place in places],
        max(times) - min(times),
    )


def _reap(pids: list[int], ends: dict[int, tuple[int | None, float]], options: int) -> None:
    for rank in set(range(len(pids))) - ends.keys():
        pid, status = os.waitpid(pids[rank], options)
        if pid:
            ends[rank] = (os.waitstatus_to_exitcode(status), time.monotonic())


def _be_rank(
    argv: Sequence[str], place: Path, kills: Sequence[Armed], host: str | None
) -> NoReturn:
    """The forked process's whole life; it does not outlive the one that forked it."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        redirect(place)
        os.environ.clear()
        os.environ.update(_environ())
        torch.set_num_threads(1)
        if host is not None:
            enter_host(host)
        for kill in kills:
            kill.arm()
        status = status_of(lambda: importlib.import_module("dist_clm_train").main(argv))
    finally:
        os._exit(status)


def _environ() -> dict[str, str]:
    ours = ("GLOO_", "NCCL_", "WANDB_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
