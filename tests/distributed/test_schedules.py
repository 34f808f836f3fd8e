"""Tests the learning rates in a run's metrics against transformers' schedules."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

from monitor.metrics import read_metrics
from tests.support.alone import train_alone
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.models import make_shards

LR, LOWEST, WARMUP, UPDATES, ACCUMULATE = 1e-3, 2e-4, 2, 7, 2
COUNTS = {"num_warmup_steps": WARMUP, "num_training_steps": UPDATES}
SCHEDULES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "default": ("", partial(get_linear_schedule_with_warmup, **COUNTS)),
    "cosine": ("--lr-schedule cosine", partial(get_cosine_schedule_with_warmup, **COUNTS)),
    "constant": (
        "--lr-schedule constant",
        partial(get_constant_schedule_with_warmup, num_warmup_steps=WARMUP),
    ),
    "linear-to": (
        f"--min-lr {LOWEST}",
        partial(get_polynomial_decay_schedule_with_warmup, lr_end=LOWEST, **COUNTS),
    ),
    "cosine-to": (
        f"--lr-schedule cosine --min-lr {LOWEST}",
        partial(get_cosine_with_min_lr_schedule_with_warmup, min_lr=LOWEST, **COUNTS),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schedules")
    write_jsonl(path / "a.jsonl", make_texts(20, seed=1))
    make_shards(path, "model", "gptneox", {"num_hidden_layers": 1})
    return path


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_has_the_rates_of_transformers(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.recorder.draw_loss", lambda *_: None)
    own, make_schedule = SCHEDULES[name]
    flags = flags_of(f"""
        --model-name {folder}/shards/model --model-type gptneox --num-layers 1 --embedding-dim 32
        --task-name {folder}/a.jsonl --seq-length 8 --batch-size 1 --use-cuda false
        --gradient-accumulate-step {ACCUMULATE} --total-steps {UPDATES * ACCUMULATE}
        --warmup-steps {WARMUP} --lr {LR} --checkpoint-path {folder / name}
    """)
    train_alone(flags | flags_of(own))
    lines = read_metrics(folder / name / "metrics.jsonl")
    rates = [line["lr"] for line in lines]
    assert rates[::ACCUMULATE] == [None] * UPDATES, "no update ends in these steps"
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    schedule = make_schedule(theirs)
    for rate in rates[ACCUMULATE - 1 :: ACCUMULATE]:
        assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-20)
        theirs.step()
        schedule.step()
