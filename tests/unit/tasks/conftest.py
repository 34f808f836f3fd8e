"""Settings of the tests of `tasks/`."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from tasks.tokenization import prefetch


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Limits a tokenized batch to 16 documents: a larger one would read a small source many times.

    With small batches, the streams also cross many batch ends.
    """
    with patch.object(prefetch, "BATCH_DOCUMENTS", 16):
        yield
