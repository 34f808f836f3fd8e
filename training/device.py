"""The choice of a rank's device, and of the backends that send messages between ranks."""

import logging
import os

import torch

from arguments.settings import ParallelSettings
from modules.attention.sdpa import disable_cudnn_attention
from training.gpu_environment import DETERMINISTIC_CUBLAS

logger = logging.getLogger(__name__)


def choose_device(
    parallel: ParallelSettings, *, use_offload: bool, ranks_here: int
) -> torch.device:
    """Returns the device that the flags select; a GPU also becomes torch's current device.

    The `ranks_here` processes of this machine share its cores equally if they compute on them: on a
    CPU, and on a GPU with --use-offload, which updates the weights on the host.

    Raises:
        ValueError: a flag requests a GPU that this machine lacks.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    use_cuda = present > 0 if parallel.use_cuda is None else parallel.use_cuda
    if not use_cuda:
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(_share_of_cores(ranks_here))
        return torch.device("cpu")
    if parallel.cuda_id >= present:
        asked = f"--cuda-id {parallel.cuda_id}"
        if not present:
            asked = f"--use-cuda {parallel.use_cuda}".lower()
        raise ValueError(f"{asked}: this machine has {present} CUDA devices")
    torch.cuda.set_device(parallel.cuda_id)
    disable_cudnn_attention()
    if use_offload:
        _set_threads_for_offload(ranks_here)
    return torch.device("cuda", parallel.cuda_id)


def _set_threads_for_offload(ranks_here: int) -> None:
    """Sets the number of CPU threads that update the weights with --use-offload.

    torchrun sets OMP_NUM_THREADS to 1 where it is unset, and one thread updates 3 billion weights
    in 10 s. So a 1 under torchrun does not count as the user's choice; another number does.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        torch.set_num_threads(_share_of_cores(ranks_here))
    logger.info(
        "--use-offload: %d CPU threads of each rank update its weights (%d ranks and %d cores "
        "here)",
        torch.get_num_threads(),
        ranks_here,
        len(os.sched_getaffinity(0)),
    )


def _share_of_cores(ranks_here: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def use_deterministic_cuda() -> None:
    """Makes torch use deterministic CUDA kernels only; an operation without one raises an error.

    Raises:
        ValueError: CUBLAS_WORKSPACE_CONFIG has a value with which cuBLAS is not deterministic.
    """
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if config not in DETERMINISTIC_CUBLAS:
        raise ValueError(
            f"--deterministic true: CUBLAS_WORKSPACE_CONFIG is {config!r}, expected "
            f"{' or '.join(DETERMINISTIC_CUBLAS)}, or unset"
        )
    torch.use_deterministic_algorithms(True)
    # By default this mode also fills every new tensor, which takes time and helps no one: each of
    # our kernels writes all elements of its result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def choose_backends(parallel: ParallelSettings, device: torch.device) -> tuple[str, str]:
    """Returns the backends for --dist-backend and --dp-backend; on a CPU, both are gloo."""
    if device.type == "cuda":
        return parallel.dist_backend or "cupy_nccl", parallel.dp_backend or "nccl"
    asked = {"--dist-backend": parallel.dist_backend, "--dp-backend": parallel.dp_backend}
    for flag, backend in asked.items():
        if backend not in (None, "gloo") and parallel.rank == 0:
            logger.warning("%s %s needs a GPU: using gloo on the CPU", flag, backend)
    return "gloo", "gloo"
