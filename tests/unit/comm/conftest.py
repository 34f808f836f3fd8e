"""Fixture for tests that start processes; at the end of a test, its processes are killed."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.launcher import Launch, Process, start


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Yields a launcher: a process calls `function(ready, ...)`, which creates the file `ready`."""
    started: list[Process] = []

    def launch_one(function: Callable[..., object], *args: object, **options: object) -> Process:
        program = partial(function, **options)
        started.append(start(tmp_path, str(len(started)), program, *args))
        return started[-1]

    yield launch_one
    for process in started:
        process.kill()
