"""The engine of a dry run: it records the live bytes of each action of an iteration.

The code of the real engine runs, in the order of the schedule. The dry run therefore needs no
separate count of the engine's tensors.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from pipeline_parallel.engine import Engine, Losses
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.schedule.schedules import Action, Kind
from planning.memory.live_bytes import LiveBytes


class Watched(NamedTuple):
    """The peak of the live bytes during an action, and the live bytes after the action."""

    action: Action
    peak: int
    after: int


class FakeEngine(Engine):
    """An engine that records the live bytes on `device_type` and reads no values of tensors."""

    def watch(self, live: LiveBytes, device_type: str) -> list[Watched]:
        """Returns a list; each later action appends a `Watched` to the list."""
        self._live, self._device_type = live, device_type
        self._watched: list[Watched] = []
        return self._watched

    def _run(
        self, action: Action, run: Callable[[int, PipelineBatch], None], batch: PipelineBatch
    ) -> None:
        self._live.reset_peak()
        run(action.microbatch, batch)
        kind = self._device_type
        self._watched.append(Watched(action, self._live.peak[kind], self._live.current[kind]))

    def _finish(self, batch: PipelineBatch) -> Losses:
        self._link.flush()
        self._losses.clear()
        return Losses([], 0)


ON_DEVICE = ("positions", "bounds", "by_length", "original_order")  # properties of PackedDocuments
ON_HOST = ("lengths_of_rows", "longest", "groups")


class FakeBatch(PipelineBatch):
    """A batch of fake tensors; each microbatch has documents as long as the given `documents`."""

    def __init__(
        self,
        token_ids: Tensor | None,
        labels: Tensor | None,
        keys: Sequence[int],
        micro_rows: int,
        documents: PackedDocuments | None,
    ) -> None:
        super().__init__(token_ids, labels, keys, micro_rows)
        self._documents = documents

    @staticmethod
    def documents_of(doc_starts: Tensor) -> PackedDocuments:
        """Returns documents whose properties are already computed.

        The dry run cannot compute them from fake tensors, which have no values.
        """
        documents = PackedDocuments(doc_starts, torch.device("cpu"))
        for name in (*ON_DEVICE, *ON_HOST):
            getattr(documents, name)
        return documents

    def documents(self, microbatch: int, device: torch.device) -> PackedDocuments | None:
        if self._documents is None:
            return None
        doc_starts = torch.empty(self._documents.doc_starts.shape, dtype=torch.int64)
        fake = PackedDocuments(doc_starts, device)
        for name in ON_DEVICE:
            tensor = getattr(self._documents, name)
            fake.__dict__[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name in ON_HOST:
            fake.__dict__[name] = getattr(self._documents, name)
        return fake


def peak_of_more(watched: Sequence[Watched], more: int, *, sent: int) -> int:
    """Returns the peak bytes of an iteration with `more` microbatches more than in `watched`.

    `watched` has the live bytes of the actions that ran. If `more` is not 0, the schedule must run
    all forwards before the first backward (gpipe). Until the second backward ends, each
    additional microbatch adds the bytes that its forward leaves live: as many as the third forward,
    because the first forward also creates tables and the last forwards need less. Later, each
    additional microbatch adds only `sent`: the bytes of the gradient that its backward sends, which
    stays live until the stage knows that the send is complete.
    """
    forwards = [entry for entry in watched if entry.action.kind is Kind.FORWARD]
    first, rest = watched[: len(forwards) + 2], watched[len(forwards) + 2 :]
    held = forwards[2].after - forwards[1].after if more else 0
    return max(
        *(entry.peak + more * held for entry in first),
        *(entry.peak + more * sent for entry in rest),
    )
