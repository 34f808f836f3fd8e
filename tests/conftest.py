"""Settings of every test process.

Each process has one thread, because several tests run at once, and threads that wait for a busy
core are far slower than one thread. SIGINT gets its default handler, because pytest ignores
SIGINT when it is a shell's background job, and so would the processes that tests start and
interrupt.
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
    """Resets the matmul backend after each test module, because some tests change the backend."""
    yield
    backend = sys.modules.get("modules.matmul.backend")  # an import of it would take seconds
    if backend is not None:
        backend.use_matmul("default")
