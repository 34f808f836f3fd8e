"""Tests that conversion to shards, to a checkpoint and back to Hugging Face keeps all weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoint.files import hf_weights as hf_files
from checkpoint.files.layer_shards import load_layer_shard
from checkpoint.steps.latest import write_latest
from pipeline_parallel.partition.split import Split
from tests.support import checkpoint_models
from tests.support.checkpoint_models import (
    NUM_LAYERS,
    TOKENIZER_FILES,
    VOCAB,
    copy_config,
    edit_json,
    edit_weights,
    family,
    hf_weights,
    make_checkpoint,
    make_model,
    make_predecessors,
    save_model,
    step_meta,
)


def to_shards(name: str, source: Path, tmp_path: Path, dtype: str = "keep") -> Path:
    return checkpoint_models.to_shards(source, tmp_path / "shards", name, dtype=dtype)


def to_hf(name: str, checkpoint: Path, tmp_path: Path, **options: Any) -> Path:
    """Converts `checkpoint` to Hugging Face with --verify; returns the folder of the result."""
    save_path = tmp_path / "result" / "hf"
    return checkpoint_models.to_hf(checkpoint, save_path, name, verify=True, **options)


def ours(
    name: str, model: Any, tmp_path: Path, *counts: int, dtype: str = "keep"
) -> tuple[dict[str, Tensor], Path]:
    """Returns a model's weights, and the folder of a run with a checkpoint of this model.

    `counts` has the number of layers of each stage. The checkpoint includes config, tokenizer and
    meta.json.
    """
    source = save_model(model, tmp_path / "in")
    shards, run = to_shards(name, source, tmp_path, dtype), tmp_path / "run"
    make_checkpoint(shards, run / "7", counts=counts, meta=step_meta(7, counts, name))
    write_latest(run, 7)
    copy_config(shards, run / "7")
    return hf_weights(source), run


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def load_back(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not report[problem]
    return model.eval()


def logits(model: Any) -> Tensor:
    tokens = torch.randint(VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        result: Tensor = model(tokens).logits
    return result


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("gptj", (1, 1, 1)),
        ("gptj", (3,)),
        ("gptneox", (2, 1)),
        ("gptneox", (1, 2)),
        ("llama", (1, 2)),
        ("mistral", (2, 1)),
        ("qwen2", (3,)),
        ("qwen3", (1, 1, 1)),
    ],
)
def test_logits_come_back_to_the_bit(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    model = make_model(name)
    original, run = ours(name, model, tmp_path, *counts)
    result = to_hf(name, run, tmp_path)
    assert torch.equal(logits(load_back(result)), logits(model))
    check_same(hf_weights(result), original)
    assert all((result / file).read_text() == text for file, text in TOKENIZER_FILES.items())


# layers of the stages, and flags with the same meaning
SAID: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2, 1), {"n_stages": 2, "n_layer_per_stage": 2}),
    ((2, 1), {"n_layer_per_stage": Split((2, 1))}),
    ((1, 2), {"n_stages": 2, "n_layer_per_stage": Split((1, 2))}),
]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(("counts", "said"), SAID)
def test_flags_say_what_meta_json_tells_or_stand_in_for_it(
    counts: tuple[int, ...], said: dict[str, Any], told: bool, tmp_path: Path
) -> None:
    original, run = ours("gptj", make_model("gptj"), tmp_path, *counts)
    if not told:
        make_predecessors(run / "7")
    check_same(hf_weights(to_hf("gptj", run, tmp_path, **said)), original)


@pytest.mark.parametrize(
    ("name", "form"),
    [("gptj", "sharded"), ("gptj", "sharded-bin"), ("gptneox", "bin"), ("gptneox", "legacy")],
)
def test_every_input_form_gives_the_same_shards(name: str, form: str, tmp_path: Path) -> None:
    model = make_model(name)
    plain = to_shards(name, save_model(model, tmp_path / "plain"), tmp_path)
    other = to_shards(name, save_model(model, tmp_path / form, form), tmp_path)
    for index in range(NUM_LAYERS + 2):
        config, kind = model.config, family(name)
        check_same(*(load_layer_shard(path, kind, config, index) for path in (plain, other)))
    assert (other / "config.json").read_bytes() == (tmp_path / form / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_dtype_is_that_asked_for(
    dtype: str, torch_dtype: torch.dtype, saved: torch.dtype, tmp_path: Path
) -> None:
    model = make_model("gptneox", dtype=saved)
    original, run = ours("gptneox", model, tmp_path, 2, 1, dtype=dtype)
    assert json.loads((run / "7" / "config.json").read_text())["dtype"] == f"{torch_dtype}"[6:]
    result = to_hf("gptneox", run, tmp_path)
    assert load_back(result).dtype == torch_dtype
    check_same(hf_weights(result), {k: v.to(torch_dtype) for k, v in original.items()})


def test_fp16_flag_and_kept_bf16(tmp_path: Path) -> None:
    _, run = ours("gptj", make_model("gptj", dtype=torch.bfloat16), tmp_path, 2, 1)
    edit_json(run / "7" / "config.json", torch_dtype="float32")
    kept = to_hf("gptj", run, tmp_path / "kept")
    assert load_back(kept).dtype == torch.bfloat16
    half = to_hf("gptj", run, tmp_path / "fp16", fp16=True)
    config = json.loads((half / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["architectures"] == ["GPTJForCausalLM"]
    assert load_back(half).dtype == torch.float16


def test_neox_without_attention_bias_and_in_series(tmp_path: Path) -> None:
    model = make_model("gptneox", attention_bias=False, use_parallel_residual=False)
    _, run = ours("gptneox", model, tmp_path, 2, 1)
    result = to_hf("gptneox", run, tmp_path)
    assert torch.equal(logits(load_back(result)), logits(model))


def test_neox_head_under_its_other_name(tmp_path: Path) -> None:
    source = save_model(make_model("gptneox"), tmp_path / "in")
    head = hf_weights(source)["embed_out.weight"]
    edit_weights(source / "model.safetensors", {"embed_out.weight": None, "lm_head.weight": head})
    shards = to_shards("gptneox", source, tmp_path)
    saved = torch.load(shards / "pytorch_lm_head.pt", weights_only=True)
    assert torch.equal(saved["embed_out.weight"], head)


def test_buffers_of_old_hugging_face_files_are_ignored(tmp_path: Path) -> None:
    source = save_model(make_model("gptj"), tmp_path / "in", "bin")
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    buffers = {"attn.bias": mask, "attn.masked_bias": torch.tensor(-1e9)}
    for layer in range(NUM_LAYERS):
        old = {f"transformer.h.{layer}.{key}": value for key, value in buffers.items()}
        edit_weights(source / "pytorch_model.bin", old)
    shards = to_shards("gptj", source, tmp_path)
    assert "attn.bias" not in torch.load(shards / "pytorch_0.pt", weights_only=True)


def test_output_shards_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = ours("gptj", make_model("gptj"), tmp_path, 2, 1)
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 70_000)  # a block has 50,816 bytes, an end 13,000
    result = to_hf("gptj", run, tmp_path)
    names = sorted(path.name for path in result.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    load_back(result)


def test_grouping_of_modules() -> None:
    big = hf_files.SHARD_BYTES
    assert hf_files.group_modules([1, 2, 3]) == [[0, 1, 2]]
    assert hf_files.group_modules([2 * big, 1, big - 1, 1]) == [[0], [1, 2], [3]]


def test_the_empty_folder_of_that_name_is_filled(tmp_path: Path) -> None:
    (tmp_path / "shards" / "in").mkdir(parents=True)
    shards = to_shards("gptj", save_model(make_model("gptj"), tmp_path / "in"), tmp_path)
    assert [path.name for path in shards.parent.iterdir()] == ["in"]


def test_verify_rejects_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the converter swaps the weights of query and key, --verify fails and no output remains."""
    _, run = ours("gptj", make_model("gptj"), tmp_path, 2, 1)

    def swap(key: str) -> str:
        return key.translate(str.maketrans("qk", "kq")) if "_proj" in key else key

    real = hf_files.write_model

    def swapped(folder: Path, sizes: Any, read: Any) -> None:
        real(folder, sizes, lambda index: {swap(k): v for k, v in read(index).items()})

    monkeypatch.setattr("checkpoint.conversion.to_hf.write_model", swapped)
    with pytest.raises(ValueError, match="--verify: the logits"):
        to_hf("gptj", run, tmp_path)
    assert list((tmp_path / "result").iterdir()) == []


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_shards_have_the_keys_of_the_layers(name: str, tmp_path: Path) -> None:
    """A block's shard has the keys of Hugging Face's layer without prefix; see docs, Files."""
    model = make_model(name)
    shards = to_shards(name, save_model(model, tmp_path / "in"), tmp_path)
    layer = model.model.layers[1].state_dict()
    check_same(torch.load(shards / "pytorch_1.pt", weights_only=True), layer)
    embedding = {"embed_tokens.weight": model.model.embed_tokens.weight}
    check_same(torch.load(shards / "pytorch_embs.pt", weights_only=True), embedding)
    head = {"norm.weight": model.model.norm.weight, "lm_head.weight": model.lm_head.weight}
    check_same(torch.load(shards / "pytorch_lm_head.pt", weights_only=True), head)
