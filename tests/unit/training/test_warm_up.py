"""Tests the warm-up: on a GPU a microbatch of zeros runs before training, and changes nothing.

No test has a GPU. `RunContext.is_cuda` is true in the tests, while the device is the CPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from comm.run_context import RunContext
from monitor.metrics import read_metrics
from tests.support.alone import run_parts, train_alone
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.models import make_shards
from training.warm_up import warm_up

MODEL = {"num_hidden_layers": 1, "hidden_dropout": 0.1, "attention_dropout": 0.1}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("warm-up")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", MODEL)
    return flags_of(f"""
        --model-name {folder}/shards/model --model-type gptneox --num-layers 1 --embedding-dim 32
        --task-name {folder}/a.jsonl --evaluation-data {folder}/a.jsonl --evaluation-num-batch 1
        --seq-length 16 --batch-size 4 --micro-batch-size 2 --pack document --use-cuda false
        --total-steps 3 --warmup-steps 0 --lr 0.01 --seed 1
    """)


@pytest.fixture
def cuda() -> Iterator[None]:
    with patch.object(RunContext, "is_cuda", True):
        yield


def losses(flags: dict[str, Any], folder: Path) -> list[Any]:
    train_alone({**flags, "checkpoint-path": str(folder)})
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "loss" in k or "norm" in k} for line in lines]


@pytest.mark.usefixtures("cuda")
def test_a_run_with_a_warm_up_has_the_same_bits(flags: dict[str, Any], tmp_path: Path) -> None:
    """Losses, gradient norms and held-out losses are equal, with dropout and packed documents."""
    with patch("training.run.warm_up") as never:
        expected = losses(flags, tmp_path / "cold")
    assert never.call_count == 1
    assert losses(flags, tmp_path / "warm") == expected
    assert len({line["loss"] for line in expected}) == len(expected) > 1


def test_a_cpu_needs_no_warm_up(flags: dict[str, Any], tmp_path: Path) -> None:
    with patch("training.run.warm_up") as never:
        losses({**flags, "total-steps": 1}, tmp_path / "cpu")
    assert never.call_count == 0


def test_a_warm_up_of_packed_rows_has_two_documents_in_each_row(flags: dict[str, Any]) -> None:
    """The kernels that keep documents apart run, too; the gradients of zeros do not stay."""
    engine, gradients = Mock(), Mock()
    parts = run_parts({**flags, "checkpoint-path": "none"})
    warm_up(parts["settings"], parts["context"], engine, gradients)
    (batch,) = engine.warm_up.call_args.args
    documents = batch.documents(0, torch.device("cpu"))
    assert documents is not None
    assert documents.lengths_of_rows == [[8, 8], [8, 8]]
    assert batch.token_ids(0).shape == batch.labels(0).shape == (2, 16)
    gradients.zero_.assert_called_once_with()
