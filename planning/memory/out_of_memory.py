"""Explanation of an out-of-memory error: the operation, the planned memory, and a remedy."""

import gc
import traceback

from arguments.settings import Settings
from common.text import format_bytes
from monitor.out_of_memory import causes, is_out_of_memory, requested_size
from planning.memory.dry_run import DryRun, PlannedModel, StageMemory

NEXT_STEP = "the same command with --rank 0 --plan --device-memory SIZE lists the flags that help"


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
    asked = requested_size(error)
    line = f"{place}: out of memory" + (f" (requested {asked})" if asked else "")
    for cause in causes(error):
        traceback.clear_frames(cause.__traceback__)
    gc.collect()
    try:
        planned = DryRun(settings, model, cuda=cuda).of_rank(rank)
    except Exception as another:
        if not is_out_of_memory(another):
            raise
        return f"{line}; {NEXT_STEP}"
    return f"{line}; {_describe(planned)}; {NEXT_STEP}"


def _describe(planned: StageMemory) -> str:
    copied = ""
    if planned.copied:
        copied = f"{format_bytes(planned.copied)} for the copy of --async-checkpoint, "
    return (
        f"according to --plan, this rank holds {format_bytes(planned.weights)} of weights, "
        f"{format_bytes(planned.gradients)} of gradients, {format_bytes(planned.optimizer)} of "
        f"masters and moments, {copied}and up to {format_bytes(planned.activations)} of "
        f"activations and temporary tensors ({planned.held} microbatches): "
        f"{format_bytes(planned.peak)}"
    )
