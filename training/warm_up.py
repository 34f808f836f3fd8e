"""The warm-up of a GPU: a microbatch of zeros runs on every stage before the first message.

CUDA loads a kernel at its first launch, and waits for all earlier work of the GPU (CUDA programming
guide, "Lazy Loading"). During training, this earlier work includes receives, which wait for other
stages. In the warm-up no receive is posted, so the launches do not wait for another process.
"""

import torch

from arguments.settings import Settings
from comm.run_context import RunContext
from data_parallel.grad_buffer import GradBuffer
from pipeline_parallel.engine import Engine
from pipeline_parallel.microbatch import PipelineBatch


def warm_up(settings: Settings, context: RunContext, engine: Engine, gradients: GradBuffer) -> None:
    """Runs a microbatch of zeros through the stage; weights and `gradients` stay unchanged.

    The caller runs it once, before the first evaluation and the first update. `gradients` must be
    zero. The warm-up draws no numbers from torch's global generators, reports no loss, and needs
    less memory than a step.
    """
    engine.warm_up(_zeros(settings, context))
    gradients.zero_()


def _zeros(settings: Settings, context: RunContext) -> PipelineBatch:
    """Returns a batch of one microbatch; with --pack document each row has two documents."""
    update, topology = settings.update, context.topology
    shape = update.micro_batch_size, update.seq_length
    token_ids = torch.zeros(shape, dtype=torch.int64, device=context.device)
    doc_starts = None
    if settings.data.pack == "document":
        doc_starts = torch.zeros(shape, dtype=torch.int64)  # on the host
        doc_starts[:, update.seq_length // 2 :] = update.seq_length // 2
    return PipelineBatch(
        token_ids if topology.is_first else None,
        token_ids if topology.is_last else None,
        range(update.micro_batch_size),
        update.micro_batch_size,
        doc_starts,
    )
