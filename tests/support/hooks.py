"""Hooks that change a rank's process so that the rank later dies, stops, fails or is slow."""

import contextlib
import importlib
import io
import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from tests.support.runs import Attendant

_HEARD_SECONDS = 0.3  # limit for the reaction to a signal that does not kill


def find(target: str) -> tuple[Any, str]:
    """Returns module and name for `module:function`, class and name for `module:Class.method`."""
    module, _, path = target.partition(":")
    *outer, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    return owner, name


@dataclass(frozen=True)
class Kill:
    """Signals to one rank at its `nth` call of `module:function` or `module:Class.method`.

    when: `before` or `after` the call; `half` (only for torch.save): when half the file is written.
    about: only calls whose first two arguments contain this text are counted.
    wait: seconds that the rank waits before each signal, while the other ranks continue.
    signals: sent in this order; the rank continues after a signal that it survives.
    to_all: whether every rank gets the signals, as after Ctrl-C in a terminal.
    """

    moment: str
    rank: int
    target: str
    when: str = "before"
    nth: int = 1
    about: str = ""
    wait: float = 0.0
    signals: Sequence[int] = (signal.SIGKILL,)
    to_all: bool = False

    def arm(self) -> None:
        """Changes the target in this process, so that the target's `nth` call sends the signals."""
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
    """A rank whose calls of `module:function` or `module:Class.method` take longer."""

    rank: int
    target: str
    seconds: float

    def arm(self) -> None:
        owner, name = find(self.target)
        setattr(owner, name, _slower(getattr(owner, name), self.seconds, ""))


def slowed(target: str, seconds: float, about: str = "") -> AbstractContextManager[object]:
    """Delays, in the `with` block, calls of `target` if an argument begins with `about`."""
    owner, name = find(target)
    return patch.object(owner, name, _slower(getattr(owner, name), seconds, about))


def _slower(function: Callable[..., Any], seconds: float, about: str) -> Callable[..., Any]:
    def slow(*args: Any, **kwargs: Any) -> Any:
        if not about or any(str(arg).startswith(about) for arg in args):
            time.sleep(seconds)
        return function(*args, **kwargs)

    return slow


def kill_once(rank: int, seen: Callable[[int], bool]) -> Attendant:
    """Returns an Attendant (see runs.py) that kills `rank` when `seen` is true for its pid."""

    def attend(pids: Sequence[int], ended: Mapping[int, int | None]) -> None:
        if rank not in ended and seen(pids[rank]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGKILL)

    return attend


@dataclass(frozen=True)
class Skip:
    """A rank whose calls of `module:function` or `module:Class.method` do nothing."""

    rank: int
    target: str

    def arm(self) -> None:
        owner, name = find(self.target)
        setattr(owner, name, lambda *_args, **_kwargs: None)


no_picture = Skip(0, "monitor.recorder:draw_loss")  # drawing takes longer than many steps
