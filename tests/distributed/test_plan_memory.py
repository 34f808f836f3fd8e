"""Tests the memory that --plan predicts against the memory that runs of many shapes measure.

The bytes of live tensors do not depend on the speed or the load of the machine.
"""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import GPTJConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config

from modules.registry import model_type_of
from tests.support.cases import Case, meet_at, run_folder, train_cases
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import run_ranks
from tests.support.measured_memory import PLAN_WITHIN, planned_ratios

WITHIN_DOCUMENTS = 0.05  # a plan does not know the lengths of documents
SIZES = {"vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
NEOX = SIZES | {"intermediate_size": 512, "max_position_embeddings": 256}
GPTJ = {"vocab_size": 2048, "n_embd": 128, "n_layer": 2, "n_head": 8}
GPTJ |= {"n_positions": 256, "rotary_dim": 8}
WINDOW = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}
MODELS = {
    "neox": GPTNeoXConfig(**NEOX),  # head size 32: up to 128 tokens, attention keeps probabilities
    "dropout": GPTNeoXConfig(**NEOX, hidden_dropout=0.1, attention_dropout=0.1),
    "wide": GPTNeoXConfig(**{**NEOX, "num_attention_heads": 1, "vocab_size": 6000}),
    "deep": GPTNeoXConfig(**{**NEOX, "num_hidden_layers": 6, "num_attention_heads": 1}),
    "gptj": GPTJConfig(**GPTJ),
    "llama": LlamaConfig(**NEOX, num_key_value_heads=2),
    "qwen3": Qwen3Config(**NEOX, **WINDOW, num_key_value_heads=1, head_dim=64),
}


class Shape(NamedTuple):
    """A run: its stages, replicas, model and flags; if `slow`, only the slow tests run it."""

    name: str
    stages: int
    replicas: int
    model: str
    flags: str
    slow: bool = False


LONG_8BIT = "--optimizer 8bit-adam --seq-length 256"
TWO_ROWS = "--recompute false --micro-batch-size 2"
SHAPES = [
    Shape("plain", 1, 1, "neox", "--seq-length 128", slow=True),
    Shape("offload", 1, 1, "gptj", "--bf16 --recompute false --use-offload --micro-batch-size 2"),
    Shape("long", 1, 1, "gptj", "--seq-length 256 --recompute false --batch-size 7", slow=True),
    Shape("dropout", 1, 1, "dropout", "--recompute false --gradient-accumulate-step 2"),
    Shape("many", 2, 1, "neox", "--batch-size 16 --fp16", slow=True),
    Shape("zb", 2, 1, "wide", "--pp-mode zb-h1 --recompute false"),
    Shape("zb-recompute", 2, 1, "neox", f"--pp-mode zb-h1 --bf16 {LONG_8BIT}", slow=True),
    Shape("documents", 2, 1, "neox", f"--pp-mode 1f1b --pack document {TWO_ROWS}"),
    Shape("copied", 2, 1, "neox", "--async-checkpoint --bf16 --checkpoint-steps 1", slow=True),
    Shape("8bit", 1, 2, "gptj", "--fp16 --optimizer 8bit-adam --zero-stage 1"),
    Shape("three", 1, 3, "neox", "--zero-stage 1 --use-offload", slow=True),
    Shape("four", 4, 1, "deep", "--pp-mode 1f1b --recompute false --batch-size 16", slow=True),
    Shape("llama", 2, 1, "llama", "--pp-mode zb-h1 --recompute false", slow=True),
    Shape("llama-long", 1, 1, "llama", f"--bf16 --recompute false {LONG_8BIT}", slow=True),
    Shape("qwen3", 2, 1, "qwen3", "--seq-length 128 --recompute false", slow=True),
    Shape("qwen3-full", 1, 1, "qwen3", "--pp-mode 1f1b", slow=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    for name, config in MODELS.items():
        config.save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    return folder


def flags(folder: Path, shape: Shape) -> dict[str, Any]:
    family = model_type_of(folder / shape.model)
    held_out = f"--evaluation-data {folder}/a.jsonl --evaluation-num-batch 1"
    return flags_of(f"""
        --model-name {folder}/{shape.model} --load-pretrained-model false --model-type {family}
        --num-layers auto --embedding-dim 128 --task-name {folder}/a.jsonl --seq-length 64
        --batch-size 4 --total-steps 2 --measure-memory {shape.flags}
        {held_out if shape.name in ("plain", "zb") else ""}
    """)


GROUPS = [
    pytest.param(size, slow, marks=[pytest.mark.slow] * slow)
    for size, slow in sorted({(one.stages * one.replicas, one.slow) for one in SHAPES})
]


@pytest.mark.parametrize(("size", "slow"), GROUPS)
def test_the_plan_is_what_a_run_measures(size: int, slow: bool, folder: Path) -> None:
    shapes = [one for one in SHAPES if (one.stages * one.replicas, one.slow) == (size, slow)]
    places = sorted({(one.stages, one.replicas) for one in shapes})
    cases = [
        Case(one.name, flags(folder, one), shapes=[(one.stages, one.replicas)]) for one in shapes
    ]
    told, *_ = run_ranks(size, train_cases, meet_at(places), cases, folder, deadline=200.0)
    for one in shapes:
        run = run_folder(folder, one.name, one.stages, one.replicas)
        found = planned_ratios(told[run.name].lines)
        print(one.name, found)
        assert len(found) == size
        within = WITHIN_DOCUMENTS if one.name == "documents" else PLAN_WITHIN
        assert all(abs(ratio - 1) <= within for ratio in found)
