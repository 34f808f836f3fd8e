"""What every process of the tests begins with.

One thread each: tests run several at once, and threads that wait for each other's core are far
slower than none. And SIGINT as a terminal's process has it: a shell's background job ignores it,
and so would all that the tests start and interrupt.
"""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def products_of_its_own() -> Iterator[None]:
    """A run in the tests' own process chooses what multiplies its matrices, for that alone."""
    yield
    backend = sys.modules.get("modules.matmul.backend")  # which imports torch, and takes seconds
    if backend is not None:
        backend.use_matmul("default")
