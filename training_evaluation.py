"""The held-out loss, and what is known where it is no finite number."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from comm.communicator import Communicator
from comm.messages import gather_json
from comm.stopping import Asked, StopRequest
from comm.topology import Topology
from optimizer.agreement import Agreement
from pipeline_parallel.engine import Engine, PipelineBatch
from pipeline_parallel.feed import HostBatch, Scatter, evaluation_feed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss of the whole evaluation data.

    `rows` and `micro_rows` are the sequences of one pipeline's batch and of a microbatch;
    `open_batches` opens the data anew on rank 0, and is None elsewhere. `stop` is the request to
    stop that this process knows of: rank 0 hears of every rank's.
    """

    topology: Topology
    scatter: Scatter
    control: Communicator
    engine: Engine
    agreement: Agreement
    rows: int
    micro_rows: int
    open_batches: Callable[[], Iterator[HostBatch]] | None
    stop: StopRequest

    def run(self, *, may_stop: bool) -> float | Asked:
        """The mean loss of a trained token; every rank calls it and gets the same.

        It may be no finite number, which is told and no reason to stop: nothing is trained on it.
        With `may_stop`, a request to stop ends the evaluation after a batch and is returned.
        """
        batches = None if self.open_batches is None else self.open_batches()
        if batches is not None and may_stop:  # the others end where rank 0's batches end
            batches = takewhile(lambda _: self.stop.asked is None, batches)
        loss, tokens, bad = 0.0, 0, list[tuple[int, int]]()
        for number, rows in enumerate(evaluation_feed(self.scatter, self.control, batches)):
            batch = PipelineBatch(rows.tokens, rows.labels, (), self.micro_rows)
            one = self.engine.evaluate(batch)
            loss, tokens = loss + one.total, tokens + one.tokens
            bad += [
                (number, i) for i, of in enumerate(one.of_microbatches) if not math.isfinite(of)
            ]
        totals = self.agreement.agree(
            loss=loss, tokens=tokens, squared_norms=None, asked=self.stop.asked
        )
        if may_stop and totals.asked is not None:
            return totals.asked
        if not math.isfinite(totals.loss):
            self._warn(gather_json(self.control, bad))
        return totals.loss / totals.tokens

    def _warn(self, found: Sequence[Sequence[tuple[int, int]]]) -> None:
        """`found` has for each rank the numbers of a batch and a microbatch in it, from 0."""
        blocks = [
            (number * self.topology.num_replicas + rank // self.topology.num_stages) * self.rows
            + microbatch * self.micro_rows + row
            for rank, bad in enumerate(found)
            for number, microbatch in bad
            for row in range(self.micro_rows)
        ]  # fmt: skip
        logger.warning(
            "the held-out loss is not finite: it is null in the metrics; the blocks of "
            "--evaluation-data behind it are, from 1 on: %s",
            _listed(sorted(blocks)),
        )


def _listed(blocks: Sequence[int], most: int = 20) -> str:
    shown = ", ".join(str(block + 1) for block in blocks[:most])
    return shown if len(blocks) <= most else f"{shown} and {len(blocks) - most} more"
