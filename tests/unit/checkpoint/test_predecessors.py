"""Tests that files of older systems (predecessors, see docs/glossary.md) load and convert."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint.files.layer_shards import load_layer_shard
from checkpoint.steps.stage_weights import read_stage_module, resolve_checkpoint
from modules.registry import MODELS
from tests.support.checkpoint_models import hf_weights, to_hf
from tests.support.predecessors import (
    HEAD,
    buffers,
    expected_hf,
    make_checkpoint,
    make_modules,
    write_config,
)


@pytest.mark.parametrize("name", ["gptj", "gptneox"])
def test_published_shards_load(name: str, tmp_path: Path) -> None:
    family = MODELS[name].load()
    config = family.load_config(write_config(name, tmp_path))
    modules = make_modules(name)
    for index, file in enumerate(("embs", "0", "1", "2", "lm_head")):
        extra = buffers(name) if 0 < index < 4 else {}
        torch.save({**modules[index], **extra}, tmp_path / f"pytorch_{file}.pt")
        loaded = load_layer_shard(tmp_path, family, config, index)
        assert loaded.keys() == modules[index].keys()
        assert all(torch.equal(loaded[key], modules[index][key]) for key in loaded)
        assert all(value.dtype == torch.float16 for value in loaded.values())


@pytest.mark.parametrize("name", ["gptj", "gptneox"])
@pytest.mark.parametrize("meta", ['{"step": 20}', None])
def test_checkpoints_convert_with_every_tensor_equal(
    name: str, meta: str | None, tmp_path: Path
) -> None:
    make_checkpoint(name, tmp_path / "run" / "checkpoint_20", meta)
    make_checkpoint(name, tmp_path / "run" / "10")
    (tmp_path / "run" / "latest").write_text("20\n")
    config = str(write_config(name, tmp_path / "config"))
    flags = {"n_stages": 2, "n_layer_per_stage": 2, "config_name": config, "verify": True}
    to_hf(tmp_path / "run", tmp_path / "hf", name, **flags)
    written, expected = hf_weights(tmp_path / "hf"), expected_hf(name, make_modules(name))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert all(value.dtype == torch.float16 for value in written.values())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float16
    assert (tmp_path / "hf" / "tokenizer.json").exists()


def test_training_reads_one_module_of_a_stage(tmp_path: Path) -> None:
    make_checkpoint("gptneox", tmp_path / "checkpoint_20")
    family = MODELS["gptneox"].load()
    config = family.load_config(write_config("gptneox", tmp_path))
    path = tmp_path / "checkpoint_20" / "prank_1_checkpoint.pt"
    head = read_stage_module(path, family, config, range(3, 5), 1)
    assert head.keys() == HEAD["gptneox"].keys()
    assert torch.equal(head["embed_out.weight"], make_modules("gptneox")[4]["embed_out.weight"])


def test_latest_prefers_our_folder_over_a_predecessors(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_30").mkdir()
    (tmp_path / "latest").write_text("30")
    assert resolve_checkpoint(tmp_path) == tmp_path / "checkpoint_30"
    (tmp_path / "30").mkdir()
    assert resolve_checkpoint(tmp_path) == tmp_path / "30"
    assert resolve_checkpoint(tmp_path / "checkpoint_30") == tmp_path / "checkpoint_30"
