"""Detection of out-of-memory errors, whose types and texts differ between libraries."""

import errno
import re
from collections.abc import Iterator

import torch

_HOST_MESSAGE = re.compile(r"can't allocate memory|cannot allocate memory", re.IGNORECASE)
_DEVICE_MESSAGE = re.compile("out of memory", re.IGNORECASE)
# The words of CUDA's libraries if they cannot allocate, such as CUBLAS_STATUS_ALLOC_FAILED.
# cublasCreate says NOT_INITIALIZED: when torch first calls it, torch has already used the GPU, so
# CUDA works, and the new handle lacks memory in almost all cases. Other functions mean another
# error by it. An earlier fault of a kernel can end in the same words, so the error line quotes the
# status.
_STATUS = re.compile(
    r"\w+_STATUS_(?:INTERNAL_ERROR_\w+_)?ALLOC(?:ATION)?_FAILED"
    r"|CUBLAS_STATUS_NOT_INITIALIZED(?= when calling `cublas(?:Lt)?Create)"
)
_REQUEST = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error`, or an error in its chain of causes, means out of memory."""
    return any(map(_means_out_of_memory, causes(error)))


def requested_size(error: BaseException) -> str:
    """Returns the size of the failed allocation, such as `2.00 GiB`; "" if it is unknown."""
    matches = (_REQUEST.search(str(e)) for e in causes(error) if _means_out_of_memory(e))
    return next((match[1] for match in matches if match is not None), "")


def library_status(error: BaseException) -> str:
    """Returns the status of a CUDA library that could not allocate; "" for other errors."""
    matches = (_STATUS.search(str(e)) for e in causes(error) if isinstance(e, RuntimeError))
    return next((match[0] for match in matches if match is not None), "")


def is_host_memory(error: BaseException) -> bool:
    """Returns whether an out-of-memory error is about host memory, not about a GPU's memory.

    The first error in the chain that means out of memory decides: the error of a pinned allocation
    has an error as its cause that has the words of a full GPU.
    """
    return next(map(_means_host_memory, filter(_means_out_of_memory, causes(error))), False)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields `error` and its chain of causes."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _means_out_of_memory(error: BaseException) -> bool:
    if _means_host_memory(error) or isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return any(pattern.search(str(error)) for pattern in (_DEVICE_MESSAGE, _STATUS))


def _means_host_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return _HOST_MESSAGE.search(str(error)) is not None
    return isinstance(error, MemoryError)
