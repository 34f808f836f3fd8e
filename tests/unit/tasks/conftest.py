"""Settings of the tests of `tasks/`."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from tasks.tokenization import prefetch


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Makes batches of 16 documents, so that no small source is read many times for one batch.

    Streams also meet many ends of batches.
    """
    with patch.object(prefetch, "BATCH_DOCUMENTS", 16):
        yield
