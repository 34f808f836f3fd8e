"""Texts of NCCL's errors, with the means to find the cause.

NCCL itself often says only "unhandled cuda error" or "unhandled system error".
"""

import os
import re

import torch

from common.text import format_bytes

# Results of nccl.h that CuPy does not know: for these it raises KeyError in place of NcclError.
_UNKNOWN_TO_CUPY = {7: "ncclInProgress; unset NCCL_COMM_BLOCKING", 8: "ncclTimeout"}
_ADVICE = re.compile(r" \(run with NCCL_DEBUG=\w+ for details\)")


def describe(error: Exception) -> str:
    """Returns the error in one line without a full stop; NCCL's errors get advice.

    Args:
        error: of NCCL through CuPy (NcclError or KeyError), of torch.distributed, or of a store.
    """
    text = str(error)
    if isinstance(error, KeyError):
        code = error.args[0]
        name = _UNKNOWN_TO_CUPY.get(code, "see nccl.h")
        line = f"NCCL's result is {code} ({name})"
    else:
        line = text.splitlines()[0].rpartition("] ")[2] if text else type(error).__name__
        line = _ADVICE.sub("", line).rstrip(". ")
        cause = text.partition("\nLast error:\n")[2]  # torch quotes NCCL's last warning
        if cause:
            line += f": {cause.splitlines()[0].rstrip('. ')}"
        if "nccl" not in line.lower():
            return line
    if "NCCL_DEBUG" in os.environ:
        return line
    return f"{line} (NCCL logs more with NCCL_DEBUG=WARN in the environment)"


def free_memory(error: Exception, device: torch.device) -> str:
    """Returns "; ... free" if `error` is a CUDA error of NCCL on a GPU, otherwise "".

    A GPU without enough free memory is the usual cause when a communicator cannot be made.
    """
    if device.type != "cuda" or "unhandled cuda error" not in str(error).lower():
        return ""
    try:
        free, total = torch.cuda.mem_get_info(device)
    except RuntimeError:  # the error that NCCL met may also stop this call
        return ""
    return f"; {format_bytes(free)} of the GPU's {format_bytes(total)} are free"
