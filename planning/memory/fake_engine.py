"""One iteration of a stage with tensors that hold nothing: how much would be alive, and when.

The engine's own code runs, in the schedule's order, so that what is held when is no second account
of it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from modules.attention.packed_documents import PackedDocuments
from pipeline_parallel.engine import Engine, Losses
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.schedule.schedules import Action, Kind
from planning.memory.live_bytes import LiveBytes


class Watched(NamedTuple):
    """The most bytes that were alive during an action, and those that are after it."""

    action: Action
    peak: int
    after: int


class FakeEngine(Engine):
    """An engine that watches what is alive on `device_type`, and asks no tensor for its values."""

    def watch(self, live: LiveBytes, device_type: str) -> list[Watched]:
        """The list that is filled from now on."""
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


PLACED = ("positions", "bounds", "by_length", "back_in_place")  # of Documents, on the device
KNOWN = ("lengths_of_rows", "longest", "groups")


class FakeBatch(PipelineBatch):
    """A batch whose documents, where they are kept apart, are in every microbatch those of
    `documents`, which were made where tensors have values."""

    def __init__(
        self,
        tokens: Tensor | None,
        labels: Tensor | None,
        *,
        rows: int,
        num_rows: int,
        documents: PackedDocuments | None,
    ) -> None:
        super().__init__(tokens, labels, range(num_rows), rows)
        self._documents = documents

    @staticmethod
    def documents_of(begins: Tensor) -> PackedDocuments:
        """Documents for all microbatches; `begins` is as `PackedDocuments` has it."""
        documents = PackedDocuments(begins, torch.device("cpu"))
        for name in (*PLACED, *KNOWN):
            getattr(documents, name)
        return documents

    def documents(self, microbatch: int, device: torch.device) -> PackedDocuments | None:
        return None if self._documents is None else _without_values(self._documents, device)


def _without_values(documents: PackedDocuments, device: torch.device) -> PackedDocuments:
    found = PackedDocuments(_like(documents.doc_starts, torch.device("cpu")), device)
    for name in PLACED:
        found.__dict__[name] = _like(getattr(documents, name), device)
    for name in KNOWN:
        found.__dict__[name] = getattr(documents, name)
    return found


def _like(tensor: Tensor, device: torch.device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def peak_of_more(watched: list[Watched], more: int, *, sent: int) -> int:
    """The most bytes of an iteration, were `more` microbatches added to those that were `watched`.

    For schedules that hold them all from forward on (gpipe): each then adds what a forward leaves
    behind, until the backwards have begun; after that, the `sent` bytes of the gradient that waits
    to be known to have arrived. The first forward makes tables, and the last ones wait for nothing:
    it is the third that shows it.
    """
    forwards = [one for one in watched if one.action.kind is Kind.FORWARD]
    first, rest = watched[: len(forwards) + 2], watched[len(forwards) + 2 :]
    held = forwards[2].after - forwards[1].after if more else 0
    peaks = [one.peak + more * held for one in first] + [one.peak + more * sent for one in rest]
    return max(peaks)
