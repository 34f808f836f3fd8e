"""Tests the counts of tokens and floating-point operations of an iteration."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from comm.backends.single_process import SingleProcessCommunicator
from comm.process_groups import ProcessGroups
from comm.run_context import RunContext
from comm.topology import Topology
from modules.registry import MODELS
from monitor.metrics import StepWork, read_metrics
from tests.support.alone import train_alone
from tests.support.cases import settings_of
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.models import make_hf, make_shards
from training.step_work import step_work

STAGES, REPLICAS, ROWS, TOKENS = 2, 3, 4, 24


def work_of(family: str, config: Any, device: str = "cpu", precision: str = "") -> StepWork:
    settings = settings_of(
        flags_of(f"""
            --model-name nowhere --model-type {family} --num-layers auto --embedding-dim 32
            --task-name nothing --total-steps 1 --seq-length {TOKENS} --batch-size {ROWS}
            --micro-batch-size 2 --world-size {STAGES * REPLICAS}
            --pipeline-group-size {STAGES} --data-group-size {REPLICAS} {precision}
        """)
    )
    alone = SingleProcessCommunicator()
    groups, topology = ProcessGroups(alone, alone, alone), Topology(0, STAGES, REPLICAS)
    context = RunContext(topology, groups, torch.device(device), "0123")
    return step_work(settings, context, MODELS[family].load().sizes(config))


def counted_flops(model: Any) -> float:
    """Returns the operations of a Hugging Face model's forward and backward, counted by torch.

    The counter sees every matrix product. Plain attention also computes the half of the scores that
    the causal mask removes; of TOKENS keys, a token needs (TOKENS + 1) / 2 on average. transformers
    computes the angles of GPT-NeoX's rotary embedding by a product, too; this one is left out.
    """
    token_ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS))
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(model(token_ids, labels=token_ids).loss)
    counts = counter.get_flop_counts()
    rotary = sum(sum(of_module.values()) for name, of_module in counts.items() if "rotary" in name)
    attention = counts["Global"][torch.ops.aten.bmm] - rotary
    needed = attention * (TOKENS + 1) / (2 * TOKENS)
    return float(sum(counts["Global"].values()) - rotary - attention + needed)


@pytest.mark.parametrize("family", ["gptneox", "gptj"])
def test_the_operations_are_those_that_torch_counts(family: str) -> None:
    model = make_hf(family, attn_implementation="eager")
    work = work_of(family, model.config)
    assert work.num_tokens == REPLICAS * ROWS * TOKENS
    assert work.device_flops * STAGES * REPLICAS == REPLICAS * counted_flops(model)
    assert work.peak_flops is None


@pytest.mark.parametrize(
    ("precision", "others", "expected"),
    [
        ("--bf16", [312.0] * 3 + [989.4] * 2, (4 * 312.0 + 2 * 989.4) / 6),
        ("", [19.5] * 5, 19.5),
        ("--bf16", [312.0] * 4 + [None], None),  # one rank has a GPU that the table lacks
    ],
)
def test_the_peak_is_the_mean_of_all_ranks(
    precision: str, others: list[float | None], expected: float | None
) -> None:
    def gather(_group: object, value: float | None) -> list[float | None]:
        return [value, *others]

    with (
        patch("training.step_work.gather_json", gather),
        patch.object(torch.cuda, "get_device_name", return_value="NVIDIA A100-SXM4-80GB"),
    ):
        work = work_of("gptneox", make_hf("gptneox").config, "cuda", precision)
    assert work.peak_flops == (None if expected is None else pytest.approx(expected * 1e12))


def test_a_run_writes_them(tmp_path: Path) -> None:
    """The rate counts all tokens that went through the model; it was that of the trained tokens."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(20, seed=1))
    model = make_shards(tmp_path, "m", "gptneox", {})
    flags = flags_of(f"""
        --model-name {tmp_path}/shards/m --model-type gptneox --num-layers 3 --embedding-dim 32
        --task-name {tmp_path}/a.jsonl --seq-length 16 --batch-size 2 --total-steps 1
        --use-cuda false --pack document
    """)
    train_alone(flags | {"checkpoint-path": tmp_path / "run"})
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    sizes = MODELS["gptneox"].load().sizes(model.config)
    assert line["tokens"] < line["tokens_processed"] == 2 * 16
    assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(2 * 16)
    flops = 6 * 2 * 16 * (3 * sizes.work(16).block + sizes.work(16).head)
    assert line["tflops"] * line["step_seconds"] == pytest.approx(flops / 1e12)
    assert "mfu" not in line
