"""Tests what a microbatch's documents keep on the device, and how it arrives there."""

import weakref
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor

from comm.communicator import PeerLostError
from modules.attention.packed_documents import PackedDocuments
from modules.layers.rotary import Rotation, rotation
from modules.layers.selective import MODES, Recompute
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.schedule.schedules import gpipe
from tests.support.documents import doc_starts_of
from tests.support.models import from_hf, make_hf
from tests.support.pipeline_doubles import NotedCommunicator
from tests.support.stages import make_engine

CPU = torch.device("cpu")
ROWS = [[5, 1, 12, 7, 8], [33]]  # lengths of documents
TOKENS = 33
MODELS_TRIED: list[tuple[str, dict[str, Any]]] = [
    ("gptneox", {"use_parallel_residual": False}),
    ("gptj", {}),
]


def packed() -> PackedDocuments:
    return PackedDocuments(doc_starts_of(ROWS), CPU)


@pytest.mark.parametrize("recompute", MODES.values())
@pytest.mark.parametrize(("name", "changes"), MODELS_TRIED)
def test_a_microbatch_makes_its_rotations_once(
    name: str, changes: dict[str, Any], recompute: Recompute, tmp_path: Path
) -> None:
    """Each of three blocks indexed the same tables again, and once more when it was recomputed."""
    ours = from_hf(name, make_hf(name, **changes), tmp_path)
    tokens = torch.randint(0, 97, (len(ROWS), TOKENS))
    with patch.object(Rotation, "at", autospec=True, side_effect=Rotation.at) as at:
        for microbatches in (1, 2):
            logits = ours(tokens, None, documents=packed(), recompute=recompute)
            torch.autograd.backward(logits.sum())
            assert at.call_count == microbatches


def test_rotations_are_freed_with_their_microbatch() -> None:
    """Each table is taken at the positions; no reference remains when the documents are gone."""
    documents, options = packed(), {"dtype": torch.float32, "device": CPU}
    tables = [rotation(TOKENS, 6, 100.0, pairs=pairs, **options) for pairs in (False, True)]
    for table in tables:
        found = documents.rotation(table)
        assert documents.rotation(table) is found
        assert torch.equal(found.sin, table.at(documents.positions).sin)
        assert found.first == table.first
    freed = weakref.ref(found)
    del found, documents
    assert freed() is None


def test_documents_are_copied_from_pinned_memory() -> None:
    """A copy to a GPU from other memory may wait for the GPU's earlier work."""
    documents = PackedDocuments(doc_starts_of(ROWS), torch.device("cuda"))
    pinned = Mock()
    with patch.object(Tensor, "pin_memory", return_value=pinned):
        for name in ("positions", "bounds", "by_length", "original_order"):
            assert getattr(documents, name) is pinned.to.return_value
    pinned.to.assert_called_with(documents.device, non_blocking=True)
    assert pinned.to.call_count == 4


def test_a_forward_allocates_no_pinned_memory() -> None:
    """The documents of all microbatches are copied before the first receive is posted.

    Pinned memory was allocated in each forward. CUDA can wait for all work of the GPU then, and so
    for a receive whose message depends on this very forward.
    """
    device = torch.device("cuda")
    batch = PipelineBatch(None, None, range(2), 1, doc_starts_of(ROWS))
    with patch.object(Tensor, "pin_memory", return_value=Mock()) as pins:
        batch.place_documents(device)
        in_advance = pins.call_count
        for microbatch in range(2):
            documents = batch.documents(microbatch, device)
            assert documents is not None
            documents.place()
    assert pins.call_count == in_advance == 2 * 4


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_engine_copies_documents_before_it_posts_a_receive(evaluates: bool) -> None:
    communicator = NotedCommunicator(1, 2)
    communicator.at_receive = Mock(side_effect=PeerLostError)
    engine = make_engine(gpipe, communicator, num_microbatches=1)
    events: list[list[str]] = []
    batch = Mock(place_documents=lambda device: events.append(list(communicator.events)))
    with pytest.raises(PeerLostError):
        engine.evaluate(batch) if evaluates else engine.train(batch, loss_scale=1.0)
    assert events == [[]]
    assert communicator.events, "the receive was posted later"
