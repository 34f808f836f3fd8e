"""Fixture that starts processes for a test, and kills them at the end of the test."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.launcher import Launch, Process, start


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Yields `launch_one`; it calls `function(ready, ...)` in a new process, see launcher.start."""
    started: list[Process] = []

    def launch_one(function: Callable[..., object], *args: object, **options: object) -> Process:
        program = partial(function, **options)
        started.append(start(tmp_path, str(len(started)), program, *args))
        return started[-1]

    yield launch_one
    for process in started:
        process.kill()
