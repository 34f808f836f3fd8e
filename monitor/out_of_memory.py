"""Detection of out-of-memory errors, whose types and texts differ between libraries."""

import errno
import re
from collections.abc import Iterator

import torch

_MESSAGE = re.compile(r"out of memory|can't allocate memory|cannot allocate memory", re.IGNORECASE)
_REQUEST = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error`, or an error in its chain of causes, means out of memory."""
    return any(map(_means_out_of_memory, causes(error)))


def requested_size(error: BaseException) -> str:
    """Returns the size of the failed allocation, such as `2.00 GiB`; "" if it is unknown."""
    matches = (_REQUEST.search(str(e)) for e in causes(error) if _means_out_of_memory(e))
    return next((match[1] for match in matches if match is not None), "")


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields `error` and its chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _means_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _MESSAGE.search(str(error)) is not None
