"""Settings of the tests of `tasks/`."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from tasks.tokenization import prefetch


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Limits a batch to 16 documents, so that it does not span many epochs of a small source.

    With small batches, the streams also cross many batch ends.
    """
    with patch.object(prefetch, "BATCH_DOCUMENTS", 16):
        yield
