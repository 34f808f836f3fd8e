"""Tests that measured blocks give the plan of a dry run in which every block runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch import nn
from transformers import GPTJConfig, GPTNeoXConfig, Qwen3Config

from arguments.train import parse_train
from modules.build import make_layer
from modules.registry import MODELS
from pipeline_parallel.partition.split import AUTO
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.measured_blocks import MeasuredStageModel

SIZES = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 7}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 128}
WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}
CONFIGS = {
    "gptneox": GPTNeoXConfig(**SIZES, hidden_dropout=0.1, attention_dropout=0.1),
    "gptj": GPTJConfig(
        vocab_size=512, n_embd=64, n_layer=7, n_head=2, n_positions=128, rotary_dim=8
    ),
    "qwen3": Qwen3Config(**SIZES, **WINDOW, num_key_value_heads=1, head_dim=32),
}
FAST = [
    ("gptneox", 2, 1, True, "--recompute selective --pp-mode zb-h1 --bf16"),
    ("gptj", 2, 1, True, "--recompute false --pp-mode 1f1b --pack document --micro-batch-size 2"),
]
SLOW = [
    ("gptneox", 2, 1, True, "--recompute false --pp-mode zb-h1 --bf16"),
    ("gptj", 2, 1, True, "--recompute selective --pp-mode zb-h1"),
    ("gptneox", 2, 1, False, "--recompute true"),
    ("gptneox", 2, 1, False, "--recompute selective --pp-mode zb-h1 --pack document"),
    ("gptj", 2, 1, False, "--recompute true --pp-mode zb-h1"),
    ("qwen3", 1, 1, True, "--recompute false --pp-mode 1f1b"),
    ("qwen3", 2, 1, True, "--bf16 --pp-mode zb-h1 --recompute false"),
    ("qwen3", 2, 1, False, "--pack document --recompute false"),
    ("gptj", 1, 3, False, "--fp16 --zero-stage 1 --recompute false --pack document"),
    (
        "gptneox",
        1,
        2,
        True,
        "--recompute true --bf16 --use-offload --async-checkpoint --batch-size 9",
    ),
]
CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.mark.parametrize(("family_name", "stages", "replicas", "cuda", "flags"), CASES)
def test_measured_blocks_give_the_plan_of_the_blocks_themselves(
    family_name: str, stages: int, replicas: int, cuda: bool, flags: str, tmp_path: Path
) -> None:
    """Every byte is the same, for each stage, schedule and kind of optimizer."""
    family, config = MODELS[family_name].load(), CONFIGS[family_name]
    config.save_pretrained(tmp_path)
    argv = f"""--model-name {tmp_path} --model-type {family_name} --num-layers auto
        --embedding-dim 64 --seq-length 64 --batch-size 4 --total-steps 1 --task-name none.jsonl
        --pipeline-group-size {stages} --data-group-size {replicas}
        --world-size {stages * replicas} --checkpoint-path {tmp_path}/none {flags}"""
    settings = parse_train(argv.split(), {})
    split = StageSplit(AUTO, family.sizes(config), num_stages=stages, seq_len=64)
    dry_run = DryRun(settings, PlannedModel(family, config, split.layers), cuda=cuda)
    block = type(make_layer(family, config, 1, "meta"))
    with counting(block) as of_all, patch.object(MeasuredStageModel, "measure_blocks", nothing):
        every_block = [dry_run.of_rank(rank) for rank in range(stages)]
    with counting(block) as of_few:
        assert [dry_run.of_rank(rank) for rank in range(stages)] == every_block
    assert len(of_few) < len(of_all)


def nothing(*_: object, **__: object) -> None:
    """Takes the place of `measure_blocks`; a mock would keep the arguments in memory."""


@contextmanager
def counting(block: type[nn.Module]) -> Iterator[list[object]]:
    """Yields a list; each forward of a block of this class adds an element."""
    calls: list[object] = []
    forward = block.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return forward(*args, **kwargs)

    with patch.object(block, "forward", noting):
        yield calls
