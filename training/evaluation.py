"""The held-out loss, and what is known where it is no finite number."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from comm.communicator import Communicator
from comm.lifecycle.stop_signals import StopCause, StopRequest
from comm.objects import broadcast_json, gather_json
from comm.topology import Topology
from monitor.metrics import HeldOut, SetLoss
from pipeline_parallel.batch_scatter import BatchScatter, HostBatch, evaluation_feed
from pipeline_parallel.engine import Engine
from pipeline_parallel.microbatch import PipelineBatch
from training.step_totals import StepTotals, TotalsReducer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss of the whole evaluation data, and of each set of it.

    `rows` and `micro_rows` are the sequences of one pipeline's batch and of a microbatch;
    `open_sets` opens the sets anew on rank 0, by name, and is None elsewhere. The other ranks hear
    from rank 0 what sets there are. `stop` is the request to stop that this process knows of: rank
    0 hears of every rank's.
    """

    topology: Topology
    scatter: BatchScatter
    control: Communicator
    engine: Engine
    agreement: TotalsReducer
    rows: int
    micro_rows: int
    open_sets: Callable[[], Mapping[str, Iterator[HostBatch]]] | None
    stop: StopRequest

    def run(self, *, may_stop: bool) -> HeldOut | StopCause:
        """The mean loss of a trained token; every rank calls it and gets the same.

        It may be no finite number, which is told and no reason to stop: nothing is trained on it.
        With `may_stop`, a request to stop ends the evaluation after a batch and is returned.
        """
        sets = {} if self.open_sets is None else self.open_sets()
        found: dict[str, StepTotals] = {}
        for name in broadcast_json(self.control, list(sets)):
            totals = self._run_set(name, sets.get(name), may_stop=may_stop)
            if may_stop and totals.asked is not None:
                return totals.asked
            found[name] = totals
        loss = sum(one.loss for one in found.values())
        tokens = sum(one.tokens for one in found.values())
        named = {name: one for name, one in found.items() if name}
        return HeldOut(
            loss / tokens,
            {name: SetLoss(one.loss / one.tokens, one.tokens) for name, one in named.items()},
        )

    def _run_set(
        self, name: str, batches: Iterator[HostBatch] | None, *, may_stop: bool
    ) -> StepTotals:
        """The sums over one set, or over what of it came before a request to stop; rank 0 has its
        batches."""
        if batches is not None and may_stop:  # the others end where rank 0's batches end
            batches = takewhile(lambda _: self.stop.asked is None, batches)
        loss, tokens, bad = 0.0, 0, list[tuple[int, int]]()
        for number, rows in enumerate(evaluation_feed(self.scatter, self.control, batches)):
            batch = PipelineBatch(rows.tokens, rows.labels, (), self.micro_rows, rows.begins)
            one = self.engine.evaluate(batch)
            loss, tokens = loss + one.total, tokens + one.tokens
            bad += [
                (number, i) for i, of in enumerate(one.of_microbatches) if not math.isfinite(of)
            ]
        totals = self.agreement.agree(
            loss=loss, tokens=tokens, squared_norms=None, asked=self.stop.asked
        )
        if not math.isfinite(totals.loss):
            self._warn(name, gather_json(self.control, bad))
        return totals

    def _warn(self, name: str, found: Sequence[Sequence[tuple[int, int]]]) -> None:
        """`found` has for each rank the numbers of a batch and a microbatch in it, from 0."""
        blocks = [
            (number * self.topology.num_replicas + rank // self.topology.num_stages) * self.rows
            + microbatch * self.micro_rows
            + row
            for rank, bad in enumerate(found)
            for number, microbatch in bad
            for row in range(self.micro_rows)
        ]
        logger.warning(
            "the held-out loss%s is not finite: it is null in the metrics; the blocks of "
            "--evaluation-data%s behind it are, from 1 on: %s",
            f" of {name}" if name else "",
            f", {name}," if name else "",
            _listed(sorted(blocks)),
        )


def _listed(blocks: Sequence[int], most: int = 20) -> str:
    shown = ", ".join(str(block + 1) for block in blocks[:most])
    return shown if len(blocks) <= most else f"{shown} and {len(blocks) - most} more"
