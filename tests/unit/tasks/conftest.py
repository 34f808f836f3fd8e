"""Settings of the tests of `tasks/`."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from tasks.tokenization import prefetch


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Limits the prefetcher's batches to 16 documents.

    A larger batch would span many epochs of a small source. With small batches, the tests read
    many of them, so they also cover the change from one batch to the next.
    """
    with patch.object(prefetch, "BATCH_DOCUMENTS", 16):
        yield
