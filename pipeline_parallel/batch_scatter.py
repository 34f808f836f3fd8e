"""The transfer of batches from rank 0 to the first and last stage of every pipeline.

If attention is limited to single documents, every stage also gets the starts of the documents.

Token ids are small, so rank 0 can read and send them for all pipelines. It sends the rows of an
iteration while the previous iteration is computed, so no stage waits for data.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comm.communicator import Communicator, Work
from comm.topology import Topology
from tasks.loader import BatchLoader
from tasks.packing.blocks import TokenBatch


class Rows(NamedTuple):
    """The rows of a batch that one process gets.

    token_ids: (rows, seq_len), on the device; None unless the stage is the first.
    labels: (rows, seq_len), on the device; None unless the stage is the last.
    doc_starts: (rows, seq_len), in host memory, on every stage; None if attention is not limited to
        single documents.
    """

    token_ids: Tensor | None
    labels: Tensor | None
    doc_starts: Tensor | None = None


class BatchScatter:
    """The transfer of batches from rank 0 to the stages that need them.

    Every rank must call `start` and then `finish` for each batch.

    Args:
        control: the group of all processes.
        topology: the stage and replica of this process.
        rows: the number of rows of a pipeline's batch.
        seq_len: the number of tokens in a row.
        keeps_apart: whether attention is limited to single documents; if it is, every batch
            has `doc_starts`.
        device: the device for token ids and labels.
    """

    def __init__(
        self,
        control: Communicator,
        topology: Topology,
        *,
        rows: int,
        seq_len: int,
        keeps_apart: bool,
        device: torch.device,
    ) -> None:
        self._control, self._topology, self._device = control, topology, device
        self._keeps_apart = keeps_apart
        self._rows, self._shape = rows, (rows, seq_len)
        self._works: list[Work] = []
        self._buffers: dict[str, Tensor] = {}

    def start(self, batch: TokenBatch | None) -> None:
        """Starts to send `batch` on rank 0, or to receive on the other ranks (`batch` is None)."""
        self._buffers = {}
        if batch is None:
            for name, needed in self._needs(self._topology.stage).items():
                if needed:
                    self._buffers[name] = torch.empty(self._shape, dtype=torch.int64)
                    self._works.append(self._control.receive(self._buffers[name], source=0))
            return
        for replica in range(self._topology.num_replicas):
            self._send_replica(batch, replica)

    def finish(self) -> Rows:
        """Waits for the batch of the last `start`; returns the rows of this process."""
        for work in self._works:
            work.wait()
        self._works.clear()
        doc_starts = self._buffers.pop("doc_starts", None)
        placed = {name: ids.to(self._device) for name, ids in self._buffers.items()}
        return Rows(placed.get("token_ids"), placed.get("labels"), doc_starts)

    def _needs(self, stage: int) -> dict[str, bool]:
        last = self._topology.num_stages - 1
        return {"token_ids": stage == 0, "labels": stage == last, "doc_starts": self._keeps_apart}

    def _send_replica(self, batch: TokenBatch, replica: int) -> None:
        span = slice(replica * self._rows, (replica + 1) * self._rows)
        for stage in range(self._topology.num_stages):
            rank = self._topology.rank_of(stage=stage, replica=replica)
            for name, needed in self._needs(stage).items():
                if needed:
                    ids = getattr(batch, name)
                    assert ids is not None, "every batch has the starts of its documents"
                    self._place(name, torch.from_numpy(ids[span].copy()), rank)

    def _place(self, name: str, ids: Tensor, rank: int) -> None:
        if rank == 0:
            self._buffers[name] = ids
        else:
            self._works.append(self._control.send(ids, to=rank))


class BatchPrefetcher:
    """Training batches, each sent one iteration before its use.

    On rank 0, `state` and `documents` belong to the last batch that `next` returned: `state` is the
    state of the data stream after this batch, and `documents` has the origins ("file:line") of each
    row's documents.

    Args:
        scatter: sends the batches.
        loader: reads the batches on rank 0; None on other ranks.
        num_batches: the number of batches that will be used.
    """

    def __init__(
        self, scatter: BatchScatter, loader: BatchLoader | None, *, num_batches: int
    ) -> None:
        self._scatter, self._loader, self._num_left = scatter, loader, num_batches
        self.state: dict[str, Any] = {}
        self.documents: Sequence[Sequence[str]] = ()
        self._sent: TokenBatch | None = None
        self._send()

    def next(self) -> Rows:
        """Returns the rows of the next batch, and starts to send the batch after it."""
        rows = self._scatter.finish()
        if self._sent is not None:
            self.state, self.documents = self._sent.state, self._sent.documents
        self._send()
        return rows

    def _send(self) -> None:
        if self._num_left == 0:
            return
        self._num_left -= 1
        self._sent = None if self._loader is None else self._loader.next()
        self._scatter.start(self._sent)


def scatter_evaluation(
    scatter: BatchScatter, control: Communicator, batches: Iterator[TokenBatch] | None
) -> Iterator[Rows]:
    """Yields this process's rows of every batch of an evaluation.

    `batches` is None except on rank 0. Before each batch, rank 0 broadcasts whether there is a
    further batch.
    """
    while True:
        batch = None if batches is None else next(batches, None)
        more = torch.tensor([0 if batch is None else 1])
        control.broadcast(more, root=0)
        if not more.item():
            return
        scatter.start(batch)
        yield scatter.finish()
