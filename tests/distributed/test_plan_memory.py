"""Tests the memory that --plan predicts against the memory that runs of many shapes measure.

The bytes of live tensors do not depend on the speed or the load of the machine.
"""

from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from transformers import GPTJConfig, GPTNeoXConfig, LlamaConfig, Qwen3Config

from arguments.settings import Settings
from comm.topology import Topology
from modules.layers.selective import MODES
from modules.registry import MODELS as FAMILIES
from modules.registry import model_type_of
from pipeline_parallel.partition.split import AUTO
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.upper_bound import upper_bound
from tests.support.cases import Case, meet_at, run_folder, settings_of, train_cases
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
    Shape("selective", 2, 1, "neox", "--pp-mode zb-h1 --bf16 --recompute selective"),
    Shape("gptj-selective", 1, 1, "gptj", "--recompute selective --seq-length 256", slow=True),
    Shape("dropout-selective", 1, 1, "dropout", "--recompute selective", slow=True),
    Shape("four-selective", 4, 1, "deep", "--pp-mode 1f1b --recompute selective", slow=True),
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
        --batch-size 4 --total-steps 2 --measure-memory --recompute true {shape.flags}
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


def planned_settings(folder: Path, shape: Shape) -> Settings:
    own = f"""--pipeline-group-size {shape.stages} --data-group-size {shape.replicas}
        --world-size {shape.stages * shape.replicas}"""
    return settings_of(flags(folder, shape) | flags_of(own))


def planned_peaks(folder: Path, shape: Shape, recompute: str, *, cuda: bool) -> dict[int, int]:
    """Returns the planned peak of the first and the last stage, by the rank in replica 0."""
    settings = planned_settings(folder, shape).changed(recompute=recompute)
    dry_run = DryRun(settings, planned_model(shape), cuda=cuda)
    return {rank: dry_run.of_rank(rank).peak for rank in {0, shape.stages - 1}}


def planned_model(shape: Shape) -> PlannedModel:
    config = MODELS[shape.model]
    entries = {entry.hf_model_type: entry for entry in FAMILIES.values()}
    family = entries[config.model_type].load()
    split = StageSplit(AUTO, family.sizes(config), num_stages=shape.stages, seq_len=64)
    return PlannedModel(family, config, split.layers)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("cuda", "all_shapes"),
    [(False, False), pytest.param(False, True, marks=SLOW), pytest.param(True, True, marks=SLOW)],
)
def test_no_dry_run_exceeds_the_upper_bound(cuda: bool, all_shapes: bool, folder: Path) -> None:
    """The bound is clearly above the peak, but not so far that it is never of use."""
    for one in SHAPES:
        if all_shapes or one.name in ("dropout", "zb"):
            settings = planned_settings(folder, one)
            for rank, peak in planned_peaks(folder, one, "false", cuda=cuda).items():
                bound = upper_bound(settings, planned_model(one), rank)
                assert 1.5 * peak <= bound <= 12 * peak, (one.name, rank, bound / peak)


AUTO_SHAPE = Shape("auto", 2, 1, "deep", "--batch-size 8 --recompute auto")


def with_memory(room: int, _: Topology) -> AbstractContextManager[object]:
    """Makes auto choose for devices with `room` bytes."""
    return patch("planning.memory.auto_recompute.device_memory", return_value=room)


@pytest.mark.slow
def test_auto_uses_the_memory_that_there_is(folder: Path) -> None:
    """Four sizes of memory: the choice, and the plan of its peak within 1% of the measured one.

    The smallest size is not enough for any mode.
    """
    peaks = {
        value: max(planned_peaks(folder, AUTO_SHAPE, value, cuda=False).values()) for value in MODES
    }
    sizes = {
        "false": peaks["false"],
        "selective": (peaks["false"] + peaks["selective"]) // 2,
        "true": (peaks["selective"] + peaks["true"]) // 2,
        "none": peaks["true"] - 1,
    }
    cases = [
        Case(f"auto-{name}", flags(folder, AUTO_SHAPE), hook=partial(with_memory, room))
        for name, room in sizes.items()
    ]
    told, *_ = run_ranks(2, train_cases, meet_at([(2, 1)]), cases, folder, deadline=200.0)
    for name in sizes:
        lines = told[run_folder(folder, f"auto-{name}", 2, 1).name].lines
        (line,) = (line for line in lines if line.startswith("recompute: "))
        chosen = "true" if name == "none" else name
        assert line.startswith(f"recompute: {chosen}, ")
        assert ("not enough" in line) == (name == "none")
        assert all(abs(ratio - 1) <= PLAN_WITHIN for ratio in planned_ratios(lines))
        measured = [line for line in lines if line.startswith("memory of rank")]
        assert len(measured) == 2
        print(line, *measured, sep="\n")
