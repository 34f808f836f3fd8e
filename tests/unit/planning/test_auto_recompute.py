"""Tests which mode --recompute auto chooses, by the memory of the devices.

Doubles of the device's memory stand for large and small machines.
"""

import logging
import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig

from comm.topology import Topology
from modules.registry import MODELS
from pipeline_parallel.partition.split import Split
from planning.memory.auto_recompute import choose_recompute
from planning.memory.dry_run import DryRun, PlannedModel
from tests.support.alone import run_parts
from tests.support.flags import flags_of

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
CONFIG = GPTNeoXConfig(**SIZES, num_attention_heads=2, max_position_embeddings=128)
MODULE = "planning.memory.auto_recompute"
GB = 10**9


def parts(**flags: Any) -> dict[str, Any]:
    right = """--model-name none --model-type gptneox --num-layers 2 --embedding-dim 64
        --task-name none.jsonl --seq-length 128 --batch-size 4 --total-steps 1"""
    model = PlannedModel(MODELS["gptneox"].load(), CONFIG, Split((2,)))
    return {**run_parts(flags_of(right) | flags), "model": model}


@pytest.mark.parametrize(("less", "expected"), [(0, "false"), (1, "selective")])
def test_the_choice_uses_the_peak_of_the_plan(less: int, expected: str) -> None:
    """A byte less than the plan of --recompute false makes the choice another one."""
    run = parts()
    changed = run["settings"].changed(recompute="false")
    room = DryRun(changed, run["model"], cuda=False).of_rank(0).peak - less
    with patch(f"{MODULE}.device_memory", return_value=room):
        assert choose_recompute(**run).precision.recompute == expected


@pytest.mark.parametrize("value", ["true", "selective", "false"])
def test_what_the_user_gives_is_used(value: str, caplog: pytest.LogCaptureFixture) -> None:
    with patch(f"{MODULE}.device_memory") as memory, caplog.at_level(logging.INFO):
        run = parts(recompute=value)
        assert choose_recompute(**run) is run["settings"]
    memory.assert_not_called()
    assert not caplog.records


def test_a_small_run_starts_without_a_dry_run(caplog: pytest.LogCaptureFixture) -> None:
    """The model and the batches of the quick start, on a machine with little memory."""
    sizes = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4}
    config = GPTNeoXConfig(
        **sizes, vocab_size=2048, num_attention_heads=6, max_position_embeddings=256
    )
    run = parts(**{"micro-batch-size": 2, "embedding-dim": 192})
    run["model"] = PlannedModel(MODELS["gptneox"].load(), config, Split((4,)))
    with (
        patch(f"{MODULE}.device_memory", return_value=GB),
        patch(f"{MODULE}.DryRun", side_effect=AssertionError("a dry run takes seconds")),
        caplog.at_level(logging.INFO),
    ):
        assert choose_recompute(**run).precision.recompute == "false"
    assert "recompute: false, because stage 0 needs at most" in caplog.text


class Meeting:
    """The control groups of two ranks, which are threads."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=20.0)
        self.tensors: dict[int, Tensor] = {}

    def of_rank(self, rank: int) -> Any:
        return SimpleNamespace(rank=rank, size=2, all_gather=lambda x: self._gather(rank, x))

    def _gather(self, rank: int, tensor: Tensor) -> Tensor:
        self.tensors[rank] = tensor
        self.barrier.wait()
        gathered = torch.stack([self.tensors[0], self.tensors[1]])
        self.barrier.wait()
        return gathered


# The peaks of both stages by mode; then the memory of both machines, the choice, and the reason.
PEAKS = {"false": (80, 60), "selective": (60, 40), "true": (40, 20)}
MACHINES = [
    (
        (100, 100),
        "false",
        "because stage 0 needs 80 bytes of 100 bytes; --recompute selective|true",
    ),
    ((100, 50), "selective", "because without it stage 1 needs 60 bytes of 50 bytes; --recompute "),
    ((70, 30), "true", "because with selective stage 1 needs 40 bytes of 30 bytes; --recompute "),
    ((100, 10), "true", "which is not enough: stage 1 needs 20 bytes of 10 bytes; --plan --device"),
]


@pytest.mark.parametrize(("rooms", "expected", "reason"), MACHINES)
def test_ranks_on_different_machines_choose_the_same(
    rooms: tuple[int, int],
    expected: str,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The machine with the least memory for its stage decides for all; rank 0 tells it."""
    meeting, run, chosen = Meeting(), parts(), dict[int, str]()

    def of_rank(rank: int) -> None:
        context: Any = SimpleNamespace(
            topology=Topology(rank, 2, 1),
            control=meeting.of_rank(rank),
            device=rank,
            rank=rank,
            is_cuda=False,
        )
        changed = choose_recompute(run["settings"], run["model"], context)
        chosen[rank] = changed.precision.recompute

    def dry_run(settings: Any, *_: object, **__: object) -> Any:
        peaks = PEAKS[settings.precision.recompute]
        return SimpleNamespace(of_rank=lambda rank: SimpleNamespace(peak=peaks[rank]))

    with (
        patch(f"{MODULE}.device_memory", side_effect=lambda rank, **_: rooms[rank]),
        patch(f"{MODULE}.DryRun", side_effect=dry_run),
        patch(f"{MODULE}.upper_bound", return_value=1000),
        caplog.at_level(logging.INFO),
    ):
        threads = [threading.Thread(target=of_rank, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60.0)
    assert chosen == {0: expected, 1: expected}
    (record,) = caplog.records
    assert record.message.startswith(f"recompute: {expected}, {reason}")
    assert (record.levelno == logging.WARNING) == ("not enough" in reason)
