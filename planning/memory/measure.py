"""What a run holds in memory at most, measured, beside what was to be expected."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arguments.settings import Settings
from comm.objects import gather_json
from comm.run_context import RunContext
from common.text import format_bytes
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.live_bytes import CudaBytes, LiveBytes, peak_resident

logger = logging.getLogger(__name__)


class MemoryMeasure:
    """The peak of live tensor bytes of a process; nothing is measured, or told, unless `wanted`."""

    def __init__(self, *, wanted: bool, device: torch.device) -> None:
        self._wanted, self._device = wanted, device
        self._counter = CudaBytes(device) if device.type == "cuda" else LiveBytes()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """What goes on meanwhile is measured; on a CPU it takes a multiple of its time."""
        if not self._wanted:
            yield
            return
        with self._counter:
            yield

    def log(self, settings: Settings, model: PlannedModel, context: RunContext) -> None:
        """Logs on rank 0 a line for every rank, beside the plan's number; every rank calls it."""
        if not self._wanted:
            return
        kind = self._device.type
        dry_run = DryRun(settings, model, cuda=kind == "cuda")
        measured, resident = self._counter.peak[kind], peak_resident()
        planned = dry_run.of_rank(context.rank).peak
        found = gather_json(context.control, [measured, planned, resident])
        for rank, (own, expected, held) in enumerate(found):
            logger.info(
                "memory of %s: peak of live tensors %s, planned %s (%.1f%%); peak RSS %s",
                context.topology.describe(rank),
                format_bytes(own),
                format_bytes(expected),
                100 * expected / own,
                format_bytes(held),
            )
