"""Explanation of an out-of-memory error: the operation, the planned memory, and a remedy.

In a run on a GPU, host memory can run out too; then flags that spare the GPU's memory do not help.
"""

import gc
import traceback

from arguments.settings import Settings
from common.text import format_bytes
from monitor.out_of_memory import (
    causes,
    is_host_memory,
    is_out_of_memory,
    library_status,
    requested_size,
)
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.stage_memory import StageMemory

NEXT_STEP = "the same command with --rank 0 --plan --device-memory SIZE lists the flags that help"
NEXT_STEP_ON_HOST = (
    "host memory is shared by the ranks of a machine: fewer ranks there, or fewer of "
    "--use-offload and --async-checkpoint, need less"
)


def explain_out_of_memory(
    place: str,
    error: BaseException,
    settings: Settings,
    model: PlannedModel,
    *,
    rank: int,
    cuda: bool,
) -> str:
    """Returns one line that explains an out-of-memory error.

    The function first releases the memory that the error's stack frames hold, because the dry run
    that plans the memory needs memory itself.

    Args:
        place: the stage, and its operation when `error` was raised.
    """
    on_host = cuda and is_host_memory(error)
    asked, status = requested_size(error), library_status(error)
    detail = f" (requested {asked})" if asked else f" ({status})" if status else ""
    line = f"{place}: out of {'host ' if on_host else ''}memory{detail}"
    describe, next_step = _describe_device, NEXT_STEP
    if on_host:
        describe, next_step = _describe_host, NEXT_STEP_ON_HOST
    for cause in causes(error):
        traceback.clear_frames(cause.__traceback__)
    gc.collect()
    try:
        planned = DryRun(settings, model, cuda=cuda).of_rank(rank)
    except Exception as another:
        if not is_out_of_memory(another):
            raise
        return f"{line}; {next_step}"
    if not on_host and settings.precision.recompute != "true":
        next_step = f"--recompute true needs less; {next_step}"
    return f"{line}; according to --plan, this rank {describe(planned)}; {next_step}"


def _describe_host(planned: StageMemory) -> str:
    if not planned.host:
        return "keeps no state in host memory"
    sizes = {"--use-offload": planned.offloaded, "--async-checkpoint": planned.host_copy}
    kept = " and ".join(f"{format_bytes(size)} for {flag}" for flag, size in sizes.items() if size)
    return f"keeps {kept} in host memory"


def _describe_device(planned: StageMemory) -> str:
    copied = ""
    if planned.copied:
        copied = f"{format_bytes(planned.copied)} for the copy of --async-checkpoint, "
    return (
        f"holds {format_bytes(planned.weights)} of weights, "
        f"{format_bytes(planned.gradients)} of gradients, {format_bytes(planned.optimizer)} of "
        f"masters and moments, {copied}and up to {format_bytes(planned.activations)} of "
        f"activations and temporary tensors ({planned.held} microbatches): "
        f"{format_bytes(planned.peak)}"
    )
