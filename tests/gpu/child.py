"""The process of one check: its output, its time limit, and the end of all processes it started.

A check gets a session of its own (setsid). The processes that it starts stay in this session, also
if they move to process groups of their own, so the session tells which processes to end.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

GRACE = 2.0  # seconds between SIGTERM and SIGKILL
_TICK = 0.05
_STACKS = re.compile(r"^(Timeout \(|Fatal Python error)", re.MULTILINE)  # of faulthandler


@dataclass(frozen=True)
class ChildEnd:
    """The end of a process: its exit status (negative if a signal ended it) and its seconds.

    hung: whether the process still ran at its limit, and was ended.
    """

    status: int
    seconds: float
    hung: bool


def run_child(
    command: Sequence[str], *, cwd: Path, environ: Mapping[str, str], output: Path, limit: float
) -> ChildEnd:
    """Runs a command, shows its output, and ends its session after `limit` seconds.

    Standard output and standard error go to the file `output`, and to this process's output as
    they appear. Afterwards no process of the session is left.
    """
    began = time.monotonic()
    with output.open("wb") as sink, output.open("rb") as source:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            hung = not _has_ended_by(process.pid, began + limit, source)
            if hung:
                _signal_session(process.pid, signal.SIGTERM)
                _has_ended_by(process.pid, time.monotonic() + GRACE, source)
        finally:  # also if this process gets Ctrl-C or SIGTERM
            _signal_session(process.pid, signal.SIGKILL)
            process.wait()
        _show(source)
    return ChildEnd(process.returncode, time.monotonic() - began, hung)


def stacks_in(output: Path) -> str:
    """Returns the stacks that faulthandler printed to a file, up to the file's end; "" if none."""
    text = output.read_text(encoding="utf-8", errors="replace")
    first = _STACKS.search(text)
    return "" if first is None else text[first.start() :]


def _has_ended_by(pid: int, deadline: float, source: IO[bytes]) -> bool:
    """Shows the output until the process has ended; returns False if it still runs at `deadline`.

    The ended process stays a zombie, so that no other process gets its id and its session.
    """
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while os.waitid(os.P_PID, pid, options) is None:
        if time.monotonic() >= deadline:
            return False
        _show(source)
        time.sleep(_TICK)
    return True


def _show(source: IO[bytes]) -> None:
    if text := source.read().decode("utf-8", errors="replace"):
        sys.stdout.write(text)
        sys.stdout.flush()


def _signal_session(session: int, number: signal.Signals) -> None:
    for pid in _processes_of(session):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _processes_of(session: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(int(entry.name)) == session:
                    yield int(entry.name)
