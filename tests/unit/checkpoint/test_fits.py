"""Tests that loading refuses weights beyond the range of the compute type; tests `is_finite`."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.resume.load import load_checkpoint_, load_shards_
from common.tensors import is_finite
from modules.registry import MODELS
from modules.stage_model import StageModel
from pipeline_parallel.partition.split import Split
from tests.support.models import from_hf, make_hf

KEY, LAYERS = "mlp.dense_h_to_4h.bias", 3
Load = Callable[[StageModel, Path, torch.dtype], None]
FAMILY = MODELS["gptneox"].load()


def load_shards(model: StageModel, folder: Path, dtype: torch.dtype) -> None:
    load_shards_(model, folder, FAMILY, FAMILY.load_config(folder), dtype=dtype)


def load_stage(model: StageModel, folder: Path, dtype: torch.dtype) -> None:
    config, split = FAMILY.load_config(folder), Split((LAYERS,))
    load_checkpoint_(model, folder, split, FAMILY, config, dtype=dtype)


LOADS: dict[str, tuple[Load, str, str]] = {
    "shards": (load_shards, "pytorch_1.pt", KEY),
    "a checkpoint": (load_stage, "prank_0_checkpoint.pt", f"2.{KEY}"),
}
VALUES = [
    (1e5, torch.float32, torch.float16, "100000, which does not fit fp16 (largest 65504): use"),
    (-65520.0, torch.float32, torch.float16, "-65520, which does not fit fp16"),
    (65519.0, torch.float32, torch.float16, None),  # rounds to 65504
    (1e5, torch.float32, torch.bfloat16, None),
    (3.4e38, torch.float32, torch.bfloat16, "3.4e+38, which does not fit bf16"),
    (1e39, torch.float64, torch.float32, "1e+39, which does not fit fp32"),
]


def write(model: StageModel, folder: Path, value: float, kind: torch.dtype) -> None:
    """Writes shards and a checkpoint; in both, one bias has type `kind` and contains `value`."""
    state = model.state_dict()
    changed = state[f"2.{KEY}"].to(kind)
    changed[5] = value
    state[f"2.{KEY}"] = changed
    torch.save(state, folder / "prank_0_checkpoint.pt")
    for j, name in enumerate(["embs", *map(str, range(LAYERS)), "lm_head"]):
        part = {k.removeprefix(f"{j}."): v for k, v in state.items() if k.startswith(f"{j}.")}
        torch.save(part, folder / f"pytorch_{name}.pt")


@pytest.mark.parametrize(("value", "kind", "dtype", "words"), VALUES)
@pytest.mark.parametrize("load", LOADS)
def test_what_does_not_fit_is_named(
    load: str, value: float, kind: Any, dtype: Any, words: str | None, tmp_path: Path
) -> None:
    """A value too large for the compute type gives an error that names the file and the weight."""
    run, file, key = LOADS[load]
    model = from_hf("gptneox", make_hf("gptneox"), tmp_path)
    write(model, tmp_path, value, kind)
    if words is None:
        run(model, tmp_path, dtype)
        assert model.state_dict()[f"2.{KEY}"][5].item() == pytest.approx(value)
        return
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / file}: {key} holds {words}")):
        run(model, tmp_path, dtype)


@pytest.mark.parametrize(
    ("values", "kind", "finite"),
    [
        ([6e4, 6e4, 6e4], torch.float16, True),  # their sum is not finite
        ([3e38, 3e38, -1.0], torch.float32, True),
        ([3e38, 3e38, math.inf], torch.float32, False),
        ([math.inf, -math.inf, 0.0], torch.float32, False),
        ([-math.inf, 0.0, 1.0], torch.bfloat16, False),
        ([math.nan, 0.0, 1.0], torch.bfloat16, False),
        ([0, 1, 255], torch.uint8, True),
        ([], torch.float32, True),
    ],
)
def test_what_is_finite(values: list[float], kind: torch.dtype, finite: bool) -> None:
    """`is_finite` checks a tensor in parts; it finds inf and NaN, also in the last part."""
    tensor = torch.tensor(values, dtype=kind)
    assert is_finite(tensor) == finite
    assert is_finite(torch.cat([torch.zeros(2 * (1 << 22), dtype=kind), tensor])) == finite
