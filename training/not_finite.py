"""Reports of numbers that are not finite, with the stage, the parameter and the data."""

import math
from collections.abc import Sequence

from arguments.settings import UpdateSettings
from comm.objects import broadcast_json, gather_json
from comm.run_context import RunContext
from pipeline_parallel.batch_scatter import BatchPrefetcher
from pipeline_parallel.engine import Engine, Losses
from pipeline_parallel.microbatch import PipelineBatch
from training.step_totals import StepTotals


class NotFiniteReport:
    """A report that names the stage, parameter and data of a number that is not finite."""

    def __init__(
        self,
        settings: UpdateSettings,
        context: RunContext,
        *,
        engine: Engine,
        feed: BatchPrefetcher,
        parameter_names: Sequence[str],
    ) -> None:
        self._settings, self._context = settings, context
        self._engine, self._feed = engine, feed
        self.parameter_names = parameter_names

    def explain_gradients(self, totals: StepTotals) -> str:
        """Returns a text that names the first parameter whose gradient is not finite."""
        if totals.first_bad is None:  # each gradient is finite, but their sum is not
            return "the gradient norm is not finite"
        return f"{self.parameter_names[totals.first_bad]} has a gradient that is not finite"

    def explain_loss(self, batch: PipelineBatch, losses: Losses) -> str:
        """Returns a text with the stage and data that made a loss not finite; all ranks call it."""
        num_stages, settings = self._context.topology.num_stages, self._settings
        bad = [i for i, loss in enumerate(losses.of_microbatches) if not math.isfinite(loss)]
        reports = gather_json(self._context.control, [bad, self._engine.find_not_finite(batch)])
        stages = sorted({rank % num_stages for rank, (_, is_here) in enumerate(reports) if is_here})
        rows = [
            rank // num_stages * settings.batch_size + microbatch * settings.micro_batch_size + row
            for rank, (microbatches, _) in enumerate(reports)
            for microbatch in microbatches
            for row in range(settings.micro_batch_size)
        ]
        documents = self._feed.documents
        blocks = "; ".join(", ".join(documents[row]) for row in rows) if documents else ""
        blocks = broadcast_json(self._context.control, blocks)
        place = f"first in stage {stages[0]}" if stages else "only with dropout"
        return f"the loss is not finite, {place}, on the blocks from {blocks}"
