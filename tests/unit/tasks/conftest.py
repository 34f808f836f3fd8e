"""Settings of the tests of `tasks/`."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from tasks.tokenization import prefetch


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Limits a batch to 16 documents, so that it does not span many epochs of a small source.

    The tests then read many batches, so they also cover the change from one batch to the next.
    """
    with patch.object(prefetch, "BATCH_DOCUMENTS", 16):
        yield
