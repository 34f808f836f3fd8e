"""The tokens and floating-point operations of an iteration, and the peak of the devices."""

import torch

from arguments.settings import Settings
from comm.objects import gather_json
from comm.run_context import RunContext
from modules.model_sizes import ModelSizes
from monitor.device_peaks import peak_tflops
from monitor.metrics import StepWork

_FLOPS = 2 * (1 + 2)  # 2 per multiply-add; a backward has twice the multiply-adds of a forward


def step_work(settings: Settings, context: RunContext, sizes: ModelSizes) -> StepWork:
    """Returns the work of an iteration; every process calls it, to tell the peak of its device.

    The model's multiply-adds are those of complete causal attention; --pack document, which needs
    fewer, is counted in the same way. Recomputation is not counted.
    """
    update, topology = settings.update, context.topology
    num_tokens = topology.num_replicas * update.batch_size * update.seq_length
    flops = _FLOPS * sizes.multiply_adds(update.seq_length) * num_tokens
    peak = _device_peak(context.device, settings.precision.precision)
    peaks = [of_rank for of_rank in gather_json(context.control, peak) if of_rank is not None]
    is_known = len(peaks) == topology.world_size
    return StepWork(
        num_tokens=num_tokens,
        device_flops=flops / topology.world_size,
        peak_flops=1e12 * sum(peaks) / len(peaks) if is_known else None,
    )


def _device_peak(device: torch.device, precision: str) -> float | None:
    """Returns the teraflops per second of the device in this precision; None if not known."""
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), precision)
