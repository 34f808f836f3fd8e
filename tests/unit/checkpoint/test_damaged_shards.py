"""Tests that training does not start if a file of the converted model is damaged or missing."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.files.checksums import sum_file
from checkpoint.files.layer_shards import NAME, write_shard_manifest
from modules.stage_model import StageModel
from tests.support.alone import run_parts
from tests.support.checkpoint_models import cut, flip
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.models import make_shards
from tests.support.refusal import refusal
from training.build import build_model
from training.initial_state import load_weights_
from training.run_start import open_run

SHARDS = ["pytorch_embs.pt", "pytorch_0.pt", "pytorch_1.pt", "pytorch_lm_head.pt"]
SMALL = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
FLAGS = flags_of("""
    --model-type gptneox --num-layers 2 --embedding-dim 32 --seq-length 16 --batch-size 2
    --total-steps 1 --use-cuda false
""")
DAMAGES: dict[str, Callable[[Path], None]] = {"cut": cut, "flipped": flip, "gone": Path.unlink}


@dataclass(frozen=True)
class Home:
    """A converted model, and the flags of a run that starts from this model."""

    model: Path
    flags: dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("shards")
    write_jsonl(folder / "a.jsonl", make_texts(10, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": 2})
    return Home(folder / "shards" / "model", FLAGS | {"task-name": folder / "a.jsonl"})


def start(model: Path, home: Home) -> StageModel:
    """Starts a run from the layer shards in `model`; returns the stage with the loaded weights."""
    own = {"model-name": model, "checkpoint-path": model.parent / "run"}
    parts = run_parts({**home.flags, **own})
    settings, context = parts["settings"], parts["context"]
    opened = open_run(settings, context)
    stage = build_model(context, opened)
    load_weights_(stage, settings, context, opened)
    return stage


def test_the_cases_are_all_files(home: Home) -> None:
    found = {path.name for path in home.model.iterdir()}
    assert found == {*SHARDS, *SMALL, "manifest.json"}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (file, damage)
        for file in (*SHARDS, *SMALL, "manifest.json")
        for damage in DAMAGES
        if (file, damage) != ("manifest.json", "gone")  # published shards have no manifest
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(
    file: str, damage: str, home: Home, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(home.model, tmp_path / "model"))
    DAMAGES[damage](model / file)
    assert f"/model/{file}: " in refusal(lambda: start(model, home))


def test_without_a_manifest_the_same_weights_load(home: Home, tmp_path: Path) -> None:
    """Without a manifest, the same weights load; a changed weight loads too, without an error."""
    whole = start(home.model, home).state_dict()
    model = Path(shutil.copytree(home.model, tmp_path / "model"))
    (model / "manifest.json").unlink()
    loaded = start(model, home).state_dict()
    assert all(torch.equal(loaded[key], whole[key]) for key in whole)
    state = torch.load(model / SHARDS[1], weights_only=True)
    state["attention.dense.weight"][0, 0] += 1.0
    torch.save(state, model / SHARDS[1])
    key = "1.attention.dense.weight"
    assert not torch.equal(start(model, home).state_dict()[key], whole[key])


def test_a_shard_that_the_manifest_does_not_list_is_an_error(home: Home, tmp_path: Path) -> None:
    """A shard not in manifest.json is an error, because it may come from another conversion."""
    model = Path(shutil.copytree(home.model, tmp_path / "model"))
    listed = [path for path in model.iterdir() if path.name not in (NAME, SHARDS[1])]
    write_shard_manifest(model, {path.name: sum_file(path) for path in listed})
    with pytest.raises(ValueError, match=f"/{SHARDS[1]}: manifest.json does not list"):
        start(model, home)
