"""Evaluation: the loss on held-out data."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from arguments.settings import UpdateSettings
from comm.lifecycle.stop_signals import StopCause, StopRequest
from comm.objects import broadcast_json, gather_json
from comm.run_context import RunContext
from monitor.metrics import HeldOut, SetLoss
from pipeline_parallel.batch_scatter import BatchScatter, scatter_evaluation
from pipeline_parallel.engine import Engine
from pipeline_parallel.microbatch import PipelineBatch
from tasks.packing.blocks import TokenBatch
from training.step_totals import StepTotals, TotalsReducer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The measurement of the held-out loss, over all evaluation data and over each set.

    Attributes:
        open_sets: a function that returns the batches of each set, by the set's name; each call
            starts again at the first batch. It is None on ranks other than 0, which receive the
            names from rank 0.
        stop: holds the first request to stop that this process gets, if it gets one; rank 0 also
            gets the requests that come to other ranks.
    """

    settings: UpdateSettings
    context: RunContext
    scatter: BatchScatter
    engine: Engine
    totals: TotalsReducer
    open_sets: Callable[[], Mapping[str, Iterator[TokenBatch]]] | None
    stop: StopRequest

    def run(self, *, may_stop: bool) -> HeldOut | StopCause:
        """Measures the mean loss per trained token; every rank calls it and gets the same result.

        A loss that is not finite causes only a warning, because evaluation does not change the
        weights. With `may_stop`, a request to stop ends the evaluation after the current batch, and
        the method returns the request in place of the loss.
        """
        sets = {} if self.open_sets is None else self.open_sets()
        found: dict[str, StepTotals] = {}
        for name in broadcast_json(self.context.control, list(sets)):
            totals = self._run_set(name, sets.get(name), may_stop=may_stop)
            if may_stop and totals.stop_cause is not None:
                return totals.stop_cause
            found[name] = totals
        loss = sum(one.loss for one in found.values())
        tokens = sum(one.tokens for one in found.values())
        named = {name: one for name, one in found.items() if name}
        return HeldOut(
            loss / tokens,
            {name: SetLoss(one.loss / one.tokens, one.tokens) for name, one in named.items()},
        )

    def _run_set(
        self, name: str, batches: Iterator[TokenBatch] | None, *, may_stop: bool
    ) -> StepTotals:
        """Returns the total loss and the number of trained tokens of one held-out set.

        `batches` has the set's batches on rank 0, and is None on other ranks. With `may_stop`, a
        request to stop ends this function after the current batch; the totals then do not cover
        the batches that are left.
        """
        if batches is not None and may_stop:  # other ranks stop after rank 0's last batch
            batches = takewhile(lambda _: self.stop.asked is None, batches)
        loss, tokens, bad = 0.0, 0, list[tuple[int, int]]()
        for number, rows in enumerate(
            scatter_evaluation(self.scatter, self.context.control, batches)
        ):
            batch = PipelineBatch(
                rows.token_ids, rows.labels, (), self.settings.micro_batch_size, rows.doc_starts
            )
            one = self.engine.evaluate(batch)
            loss, tokens = loss + one.total, tokens + one.num_trained_tokens
            bad += [
                (number, i) for i, of in enumerate(one.of_microbatches) if not math.isfinite(of)
            ]
        totals = self.totals.reduce(
            loss=loss, tokens=tokens, squared_norms=None, stop_cause=self.stop.asked
        )
        if not math.isfinite(totals.loss):
            self._warn(name, gather_json(self.context.control, bad))
        return totals

    def _warn(self, name: str, found: Sequence[Sequence[tuple[int, int]]]) -> None:
        """Logs a warning that lists the blocks of the microbatches whose loss is not finite.

        `found` has a list for each rank: pairs of the number of a batch and the number of a
        microbatch in this batch. Both numbers start at 0.
        """
        blocks = [
            (number * self.context.topology.num_replicas + rank // self.context.topology.num_stages)
            * self.settings.batch_size
            + microbatch * self.settings.micro_batch_size
            + row
            for rank, bad in enumerate(found)
            for number, microbatch in bad
            for row in range(self.settings.micro_batch_size)
        ]
        logger.warning(
            "the held-out loss%s is not finite, and the metrics show null; the loss is not finite "
            "in these blocks of --evaluation-data%s (the first block is 1): %s",
            f" of {name}" if name else "",
            f", set {name}" if name else "",
            _listed(sorted(blocks)),
        )


def _listed(blocks: Sequence[int], most: int = 20) -> str:
    shown = ", ".join(str(block + 1) for block in blocks[:most])
    return shown if len(blocks) <= most else f"{shown} and {len(blocks) - most} more"
