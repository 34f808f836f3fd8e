"""Tests that a run begins even if a rank's reads take longer than --dist-timeout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from comm.topology import Topology
from tests.support.cases import Case, meet_at, run_folder, train_cases
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.hooks import slowed
from tests.support.kill_lab import same, state
from tests.support.launcher import run_ranks
from tests.support.models import make_shards

TIMEOUT, SLOW = 3.0, 3.6
SHAPE = (2, 2)


@contextmanager
def slow_shards(topology: Topology) -> Iterator[None]:
    """Slows the second replica's reads of layer shards."""
    seconds = SLOW / 2 if topology.replica == 1 else 0.0
    with slowed("checkpoint.resume.load:load_layer_shard", seconds):
        yield


@contextmanager
def slow_checkpoint(topology: Topology) -> Iterator[None]:
    """Slows a resume: the deletion of incomplete files, and reads of weights and optimizer state.

    One stage reads its optimizer state in two batches of weights, the other stage in three.
    """
    with (
        patch("optimizer.state_dict._BATCH_ELEMENTS", 1),
        slowed("checkpoint.steps.folder:clear_leftovers", SLOW),
        slowed("checkpoint.resume.load:read_stage_module", SLOW / 2),
        slowed("training.initial_state:read_part", SLOW),
        slowed("optimizer.saved_state:SavedState.read", SLOW, "0.embed_in"),
    ):
        yield


@pytest.mark.slow
def test_a_slow_disk_ends_no_start(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(20, seed=1))
    make_shards(tmp_path, "model", "gptneox", {"num_hidden_layers": 3})
    flags = flags_of(f"""
        --model-name {tmp_path}/shards/model --model-type gptneox --num-layers 1,2 --bf16
        --embedding-dim 32 --task-name {tmp_path}/a.jsonl --seq-length 24 --batch-size 4
        --total-steps 2 --checkpoint-steps 1
    """)
    cases = [
        Case("straight", flags, slow_shards),
        Case("resumed", flags, slow_checkpoint, after=("straight-2-2", 1)),
    ]
    told, *_ = run_ranks(
        4, train_cases, meet_at([SHAPE]), cases, tmp_path, "gloo", TIMEOUT, deadline=150.0
    )
    assert any(line.startswith("resumed from step 1") for line in told["resumed-2-2"].lines)
    straight, resumed = (run_folder(tmp_path, name, *SHAPE) for name in ("straight", "resumed"))
    for stage in range(2):
        assert same(state(resumed, stage, 2), state(straight, stage, 2))
