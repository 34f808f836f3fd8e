"""Tests the time of an iteration over links of a given speed (--plan --link)."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers import GPTNeoXConfig

from arguments.train import parse_train
from modules.registry import MODELS
from planning.link_time import time_over_links

CONFIG = GPTNeoXConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=2,
    max_position_embeddings=128,
)
MESSAGE = 2 * 64 * 64 * 4  # rows x tokens x hidden x bytes


def lines(folder: Path, flags: str, *, is_cuda: bool = False) -> list[str]:
    CONFIG.save_pretrained(folder)
    argv = f"""--model-name {folder} --model-type gptneox --num-layers auto --embedding-dim 64
        --seq-length 64 --batch-size 8 --micro-batch-size 2 --total-steps 1 --plan true
        --task-name none.jsonl --checkpoint-path {folder}/none {flags}"""
    settings = parse_train(argv.split(), {})
    sizes = MODELS["gptneox"].load().sizes(CONFIG)
    return list(time_over_links(settings, sizes, is_cuda=is_cuda))


def seconds(text: str, pattern: str) -> float:
    found = re.search(pattern + r" ([\d.]+) (ms|s)\b", text)
    assert found, text
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


@pytest.mark.parametrize(
    ("rate", "bits", "latency"), [("100kbit", 1e5, 0.0), ("1mbit,50ms", 1e6, 0.05)]
)
def test_a_pipeline_that_only_sends_takes_the_time_of_its_messages(
    rate: str, bits: float, latency: float, tmp_path: Path
) -> None:
    """Two stages, gpipe, four microbatches: the first stage gets its last gradient after all
    activations and all gradients have crossed the link, one after another."""
    flags = f"--pipeline-group-size 2 --world-size 2 --link {rate}"
    (line,) = lines(tmp_path, flags, is_cuda=True)
    one = latency + 8 * MESSAGE / bits
    assert seconds(line, "takes") == pytest.approx(one, rel=0.01)
    assert "for messages alone" in line
    assert seconds(line, "at least") == pytest.approx((4 + 4) * one, rel=0.01)


def test_devices_and_replicas_count_too(tmp_path: Path) -> None:
    """With free links, an iteration takes the time of the multiply-adds on a device of known rate.

    Forward, recomputation and backward of a token are 4 times the multiply-adds of its forward.
    """
    flags = "--data-group-size 2 --world-size 2 --link 1gbit --recompute true"
    with patch("planning.link_time.block_rate", return_value=1e9):
        of_iteration, of_exchange = lines(tmp_path, flags)
    work = MODELS["gptneox"].load().sizes(CONFIG).work(64)
    expected = 8 * 64 * (4 * 4 * work.block + 3 * work.head) / 1e9
    assert seconds(of_iteration, "free links") == pytest.approx(expected, rel=0.01)
    parameters = 4 * (4 * 64 * 64 + 2 * 64 * 256) + 2 * 64 * 512
    assert seconds(of_exchange, "in") == pytest.approx(4 * parameters * 8 / 1e9, rel=0.02)


@pytest.mark.parametrize("text", ["100", "0mbit", "100mbit,", "fast", "1gbit,5"])
def test_a_link_that_cannot_be_read_is_refused(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lines(tmp_path, f"--link {text}")
    assert "--link: expected bits per second" in capsys.readouterr().err
