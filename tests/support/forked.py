"""A fork that lives as `python dist_clm_train.py` would: its output in files, its exit status."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC


def output(place: Path, end: str) -> Path:
    """Where what a process writes goes: `end` is .out or .err."""
    return place.with_name(place.name + end)


def redirect(place: Path) -> None:
    """This process's stdout and stderr go to files from now on."""
    for descriptor, end in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output(place, end), WRITE, 0o644), descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def status_of(main: Callable[[], None]) -> int:
    """As the interpreter would end."""
    try:
        main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
