"""Tests that a snapshot copies a state into memory that the snapshot allocates only once."""

import io

import torch

from checkpoint.snapshot import Snapshot


def test_later_changes_do_not_reach_it_and_buffers_are_kept() -> None:
    flat = torch.arange(12.0)
    state = {
        "weights": {"a": flat[:6].view(2, 3), "b": flat[6:].bfloat16()},
        "optimizer": {"kind": "adam", "updates": 3, "codes": {"a": torch.ones(4).byte()}},
        "empty": {},
    }
    snapshot = Snapshot()
    first = snapshot.take(state)
    assert first["optimizer"] | {"codes": None} == {"kind": "adam", "updates": 3, "codes": None}
    assert first["empty"] == {}
    flat.add_(100)
    state["optimizer"]["codes"]["a"].zero_()  # type: ignore[index]
    assert first["weights"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert first["optimizer"]["codes"]["a"].tolist() == [1, 1, 1, 1]
    assert first["weights"]["b"].dtype == torch.bfloat16
    second = snapshot.take(state)
    assert second["weights"]["a"].data_ptr() == first["weights"]["a"].data_ptr()
    assert first["weights"]["a"].tolist() == [[100, 101, 102], [103, 104, 105]]


def test_it_is_saved_without_what_it_was_a_part_of() -> None:
    """A saved snapshot of a view is small; torch.save of the view itself writes the full tensor."""
    flat = torch.zeros(100_000)
    copied = Snapshot().take({"a": flat[:10]})
    written = io.BytesIO()
    torch.save(copied, written)
    assert len(written.getvalue()) < 4000
