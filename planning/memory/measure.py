"""The measured peak memory of a run, logged beside the planned peak."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arguments.settings import Settings
from comm.objects import gather_json
from comm.run_context import RunContext
from common.text import format_bytes
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.live_bytes import LiveBytes, peak_resident

logger = logging.getLogger(__name__)


class MemoryMeasure:
    """A measurement of the peak bytes of a process's live tensors; does nothing if not `wanted`.

    On a GPU, the peak is the peak of torch's allocator.
    """

    def __init__(self, *, wanted: bool, device: torch.device) -> None:
        self._wanted, self._device, self._live = wanted, device, LiveBytes()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures the memory of the `with` block; on a CPU this makes it several times slower."""
        if not self._wanted:
            yield
        elif self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
        else:
            with self._live:
                yield

    def log(self, settings: Settings, model: PlannedModel, context: RunContext) -> None:
        """Logs on rank 0 the measured and planned peak of every rank; all ranks must call it."""
        if not self._wanted:
            return
        is_cuda = self._device.type == "cuda"
        dry_run = DryRun(settings, model, cuda=is_cuda)
        peak = torch.cuda.max_memory_allocated(self._device) if is_cuda else self._live.peak["cpu"]
        resident = peak_resident()
        planned = dry_run.of_rank(context.rank).peak
        peaks = gather_json(context.control, [peak, planned, resident])
        for rank, (measured, expected, process) in enumerate(peaks):
            logger.info(
                "memory of %s: peak of live tensors %s, planned %s (%.1f%%); peak RSS %s",
                context.topology.describe(rank),
                format_bytes(measured),
                format_bytes(expected),
                100 * expected / measured,
                format_bytes(process),
            )
