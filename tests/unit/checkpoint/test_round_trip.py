"""Hugging Face -> layer shards -> training checkpoint -> Hugging Face: nothing is lost."""

import json
from collections.abc import Sequence
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

FORMS = ("sharded", "bin", "sharded-bin", "legacy")


def to_shards(name: str, source: Path, tmp_path: Path, dtype: str = "keep") -> Path:
    return checkpoint_models.to_shards(source, tmp_path / "shards", name, dtype=dtype)


def to_hf(name: str, checkpoint: Path, tmp_path: Path, **options: Any) -> Path:
    """Verifies."""
    save_path = tmp_path / "result" / "hf"
    return checkpoint_models.to_hf(checkpoint, save_path, name, verify=True, **options)


def ours(name: str, shards: Path, folder: Path, *counts: int) -> Path:
    """A checkpoint as our training leaves it: with config, tokenizer and meta.json."""
    make_checkpoint(shards, folder / "7", counts=counts, meta=step_meta(7, counts, name))
    write_latest(folder, 7)
    copy_config(shards, folder / "7")
    return folder


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


def half(values: Sequence[Any]) -> list[Any]:
    """Each value with both families: with one of them, by turns, only in the slow tests."""
    return [
        pytest.param(name, value, marks=() if (i + j) % 2 == 0 else pytest.mark.slow)
        for i, name in enumerate(("gptj", "gptneox"))
        for j, value in enumerate(values)
    ]


@pytest.mark.parametrize(("name", "counts"), half([(1, 1, 1), (2, 1), (3,), (1, 2)]))
def test_logits_come_back_to_the_bit(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    model = make_model(name)
    shards = to_shards(name, save_model(model, tmp_path / "in"), tmp_path)
    result = to_hf(name, ours(name, shards, tmp_path / "run", *counts), tmp_path)
    assert torch.equal(logits(load_back(result)), logits(model))
    written, original = hf_weights(result), hf_weights(tmp_path / "in")
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)
    assert all((result / file).read_text() == text for file, text in TOKENIZER_FILES.items())


# layers of the stages, and flags that say the same
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
    shards = to_shards("gptj", save_model(make_model("gptj"), tmp_path / "in"), tmp_path)
    run = ours("gptj", shards, tmp_path / "run", *counts)
    if not told:
        make_predecessors(run / "7")
    written, original = (
        hf_weights(to_hf("gptj", run, tmp_path, **said)),
        hf_weights(tmp_path / "in"),
    )
    assert written.keys() == original.keys()
    assert all(torch.equal(written[key], original[key]) for key in original)


@pytest.mark.parametrize(("name", "form"), half(FORMS))
def test_every_input_form_gives_the_same_shards(name: str, form: str, tmp_path: Path) -> None:
    model = make_model(name)
    plain = to_shards(name, save_model(model, tmp_path / "plain"), tmp_path)
    other = to_shards(name, save_model(model, tmp_path / form, form), tmp_path)
    for index in range(NUM_LAYERS + 2):
        loads = [
            load_layer_shard(folder, family(name), model.config, index) for folder in (plain, other)
        ]
        assert loads[0].keys() == loads[1].keys()
        assert all(torch.equal(loads[0][key], loads[1][key]) for key in loads[0])
    assert (other / "config.json").read_bytes() == (tmp_path / form / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_dtype_is_that_asked_for(
    dtype: str, torch_dtype: torch.dtype, saved: torch.dtype, tmp_path: Path
) -> None:
    model = make_model("gptneox", dtype=saved)
    source = save_model(model, tmp_path / "in")
    shards = to_shards("gptneox", source, tmp_path, dtype)
    assert json.loads((shards / "config.json").read_text())["dtype"] == f"{torch_dtype}"[6:]
    result = to_hf("gptneox", ours("gptneox", shards, tmp_path / "run", 2, 1), tmp_path)
    back = load_back(result)
    assert back.dtype == torch_dtype
    original = hf_weights(source)
    assert all(torch.equal(v, original[k].to(torch_dtype)) for k, v in hf_weights(result).items())


def test_fp16_flag_and_kept_bf16(tmp_path: Path) -> None:
    shards = to_shards(
        "gptj", save_model(make_model("gptj", dtype=torch.bfloat16), tmp_path / "in"), tmp_path
    )
    run = ours("gptj", shards, tmp_path / "run", 2, 1)
    edit_json(run / "7" / "config.json", torch_dtype="float32")
    kept = to_hf("gptj", run, tmp_path / "kept")
    assert load_back(kept).dtype == torch.bfloat16
    config = json.loads(
        (to_hf("gptj", run, tmp_path / "fp16", fp16=True) / "config.json").read_text()
    )
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["architectures"] == ["GPTJForCausalLM"]
    assert load_back(tmp_path / "fp16" / "result" / "hf").dtype == torch.float16


def test_neox_without_attention_bias_and_in_series(tmp_path: Path) -> None:
    model = make_model("gptneox", attention_bias=False, use_parallel_residual=False)
    shards = to_shards("gptneox", save_model(model, tmp_path / "in"), tmp_path)
    result = to_hf("gptneox", ours("gptneox", shards, tmp_path / "run", 2, 1), tmp_path)
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
    shards = to_shards("gptj", save_model(make_model("gptj"), tmp_path / "in"), tmp_path)
    monkeypatch.setattr(hf_files, "SHARD_BYTES", 70_000)  # a block has 50,816 bytes, an end 13,000
    result = to_hf("gptj", ours("gptj", shards, tmp_path / "run", 2, 1), tmp_path)
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
    """A tensor written under another's name: here query and key swapped."""
    shards = to_shards("gptj", save_model(make_model("gptj"), tmp_path / "in"), tmp_path)
    run = ours("gptj", shards, tmp_path / "run", 2, 1)

    def swap(key: str) -> str:
        return key.translate(str.maketrans("qk", "kq")) if "_proj" in key else key

    real = hf_files.write_model

    def swapped(folder: Path, sizes: Any, read: Any) -> None:
        real(folder, sizes, lambda index: {swap(k): v for k, v in read(index).items()})

    monkeypatch.setattr("checkpoint.conversion.to_hf.write_model", swapped)
    with pytest.raises(RuntimeError, match="--verify: logits"):
        to_hf("gptj", run, tmp_path)
    assert list((tmp_path / "result").iterdir()) == []
