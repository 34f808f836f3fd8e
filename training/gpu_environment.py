"""Environment variables for a GPU, set where the user left them unset; the module needs no torch.

CUDA, NCCL and torch's allocator read these variables once, at their start. Therefore the variables
are set before torch is imported, when nobody knows yet whether this machine has a GPU. On a CPU
they have no effect.

CUDA_DEVICE_MAX_CONNECTIONS: the number of hardware queues; CUDA's default is 8. The communicators
    of a middle stage with replicas have 15 to 20 streams. Streams that share a queue wait for each
    other, so a receive that waits for its message can stop the compute stream.
NCCL_MAX_P2P_NCHANNELS: the number of channels of a send or receive. Each channel occupies a
    multiprocessor while it waits: over NVLink 8 to 16 of the 132 of an H100 in each direction. Two
    channels still carry more than 40 GB/s.
PYTORCH_ALLOC_CONF: expandable segments waste less memory by fragmentation. torch rounds the size of
    pinned host memory up to a power of two; the threshold (in MiB; new in torch 2.13) limits this
    to small tensors. torch 2.13 may use a cached block of the wrong size again if its size was not
    rounded, so larger blocks must not be cached either. Older versions end with an error at an
    option that they do not know.
CUBLAS_WORKSPACE_CONFIG: with --deterministic only. Two buffer sizes make cuBLAS deterministic
    (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).
"""

import logging
import re
from collections.abc import Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version

logger = logging.getLogger(__name__)

DETERMINISTIC_CUBLAS = (":4096:8", ":16:8")
_VARIABLES = {"CUDA_DEVICE_MAX_CONNECTIONS": "32", "NCCL_MAX_P2P_NCHANNELS": "2"}
# torch reads one of these variables; the last two are its older names
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_SINCE_PINNED_THRESHOLD = (2, 13)


def set_gpu_variables(environ: MutableMapping[str, str], *, deterministic: bool) -> dict[str, str]:
    """Sets the variables that are unset in `environ`, and returns those that it set.

    `deterministic` is the value of --deterministic.
    """
    wanted = dict(_VARIABLES)
    if not any(name in environ for name in _ALLOCATOR):
        wanted[_ALLOCATOR[0]] = _allocator_options()
    if deterministic:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = DETERMINISTIC_CUBLAS[0]
    unset = {name: value for name, value in wanted.items() if name not in environ}
    environ.update(unset)
    return unset


def log_gpu_variables(variables: Mapping[str, str]) -> None:
    """Logs the variables that `set_gpu_variables` set, if there are any, in one line."""
    if variables:
        listed = ", ".join(f"{name}={value}" for name, value in variables.items())
        logger.info("for the GPU, the run sets environment variables that were unset: %s", listed)


def _allocator_options() -> str:
    options = "expandable_segments:True"
    if _torch_version() >= _SINCE_PINNED_THRESHOLD:
        options += ",pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
    return options


def _torch_version() -> tuple[int, int]:
    """Returns major and minor version of the installed torch; (0, 0) if they are not known."""
    try:
        numbers = re.match(r"(\d+)\.(\d+)", version("torch"))
    except PackageNotFoundError:
        return 0, 0
    return (0, 0) if numbers is None else (int(numbers[1]), int(numbers[2]))
