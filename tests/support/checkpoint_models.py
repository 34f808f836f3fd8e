"""Small models on disk in all formats that the converters read, and functions that damage files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoint.conversion.from_hf import convert_from_hf
from checkpoint.conversion.to_hf import convert_to_hf
from checkpoint.files.checksums import seal, sum_file, unseal
from checkpoint.steps.manifest import StageManifest
from checkpoint.steps.meta import StepMeta
from modules.families.base import Family
from modules.registry import MODELS
from pipeline_parallel.partition.split import Split

NUM_LAYERS = 3
VOCAB = 101  # odd, so no code can assume a padded vocabulary

NEOX = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 128}
LLAMA = {**NEOX, "num_key_value_heads": 2, "num_hidden_layers": NUM_LAYERS}
LLAMA |= {"max_position_embeddings": 64, "tie_word_embeddings": False}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": NUM_LAYERS, "rotary_dim": 4, "n_positions": 64},
    "gptneox": {**NEOX, "num_hidden_layers": NUM_LAYERS, "max_position_embeddings": 64},
    "llama": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "mistral": {**LLAMA, "head_dim": 12, "sliding_window": 9},
    "qwen2": {**LLAMA, **WINDOW},
    "qwen3": {**LLAMA, **WINDOW, "head_dim": 16},
}
TOKENIZER_FILES = {"tokenizer.json": '{"version": "1.0"}', "merges.txt": "#version: 0.2\n"} | {
    f"{name}.json": "{}" for name in ("tokenizer_config", "special_tokens_map", "vocab")
}


def family(name: str) -> Family:
    return MODELS[name].load()


def make_model(name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Returns a transformers model; its weights, biases and norms are random, from a fixed seed."""
    config_class = family(name).config_class
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0}
    model = AutoModelForCausalLM.from_config(config_class(**CONFIGS[name] | ends | changes))
    generator = torch.Generator().manual_seed(1)
    for key, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator) * 0.05
        weight.data.copy_(noise + (is_norm(key) and key.endswith("weight")))
    return model.to(dtype).eval()


def is_norm(key: str) -> bool:
    return "norm" in key or "ln_" in key


def save_model(model: Any, folder: Path, form: str = "single") -> Path:
    """Saves a model as safetensors or .bin, in one file or many; adds fake tokenizer files."""
    size = "20KB" if form.startswith("sharded") else "1GB"
    model.save_pretrained(folder, max_shard_size=size)
    for name, text in TOKENIZER_FILES.items():
        (folder / name).write_text(text)
    if "bin" in form or "legacy" in form:
        _to_bins(folder, legacy="legacy" in form)
    return folder


def _to_bins(folder: Path, *, legacy: bool) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        target = path.with_name(_bin_name(path.name))
        torch.save(load_file(path), target, _use_new_zipfile_serialization=not legacy)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {k: _bin_name(v) for k, v in content["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))
        index.unlink()


def _bin_name(name: str) -> str:
    return "pytorch_" + name.replace(".safetensors", ".bin")


def edit_weights(path: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Writes the tensors of `changes` into a file; removes the keys whose value is None."""
    torch_file = path.suffix != ".safetensors"
    state = torch.load(path, weights_only=True) if torch_file else load_file(path)
    state = {k: v for k, v in {**state, **changes}.items() if v is not None}
    if torch_file:
        torch.save(state, path)
    else:
        save_file(state, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def hf_weights(folder: Path) -> dict[str, Tensor]:
    """Returns all tensors of the safetensors files in a folder."""
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def make_checkpoint(
    shards: Path, folder: Path, *, counts: Sequence[int], meta: StepMeta | None
) -> Path:
    """Makes a checkpoint from layer shards; torch.save, not the project's code, writes the weights.

    `counts` has the number of layers of each stage. Without `meta`, the checkpoint has no meta.json
    and no manifests.
    """
    names = ["pytorch_embs.pt", *(f"pytorch_{i}.pt" for i in range(NUM_LAYERS))]
    modules = [torch.load(shards / name, weights_only=True) for name in names]
    folder.mkdir(parents=True)
    for stage, count in enumerate(counts):
        start = 1 + sum(counts[:stage])
        part = modules[start : start + count]
        part = [modules[0], *part] if stage == 0 else part
        if stage == len(counts) - 1:
            part.append(torch.load(shards / "pytorch_lm_head.pt", weights_only=True))
        state = {
            f"{j}.{key}": value for j, module in enumerate(part) for key, value in module.items()
        }
        torch.save(state, folder / f"prank_{stage}_checkpoint.pt")
    if meta is not None:
        (folder / "meta.json").write_bytes(meta.encode())
        for stage in range(len(counts)):
            files = ("meta.json", f"prank_{stage}_checkpoint.pt")
            sums = {name: sum_file(folder / name) for name in files}
            manifest = StageManifest(meta.step, stage, len(counts), "save", sums)
            (folder / manifest.name).write_bytes(manifest.encode())
    return folder


def step_meta(step: int, counts: Sequence[int] = (1,), model_type: str = "gptneox") -> StepMeta:
    scaler = {"kind": "constant", "scale": 1.0}
    nothing: dict[str, Any] = {key: {} for key in ("flags", "settings", "versions", "data")}
    return StepMeta(
        step=step,
        updates=step,
        update_step={"skipped_in_a_row": 0, "scaler": scaler},
        gave_up=False,
        model_type=model_type,
        num_layers=Split(counts),
        num_replicas=1,
        **nothing,
    )


def copy_config(source: Path, target: Path) -> None:
    for name in ("config.json", *TOKENIZER_FILES):
        (target / name).write_text((source / name).read_text())


def reseal(folder: Path) -> None:
    """Updates sizes and checksums in a checkpoint's manifests; a missing file stays listed."""
    for path in folder.glob("prank_*_manifest.json"):
        body = unseal(path)
        there = [name for name in body["files"] if (folder / name).is_file()]
        sums = {name: sum_file(folder / name)._asdict() for name in there}
        path.write_bytes(seal({**body, "files": {**body["files"], **sums}}))


def make_predecessors(folder: Path) -> None:
    """Deletes manifests and meta.json, which a predecessor (docs/glossary.md) does not write."""
    for path in (*folder.glob("prank_*_manifest.json"), folder / "meta.json"):
        path.unlink()


def to_shards(source: Path | str, save_dir: Path, name: str = "gptneox", **options: Any) -> Path:
    """Converts a Hugging Face folder to layer shards; `convert_from_hf` gets `options`."""
    options = {"dtype": "keep", **options}
    return convert_from_hf(family(name), model_name=str(source), save_dir=save_dir, **options)


def to_hf(source: Path, save_path: Path, name: str = "gptneox", **options: Any) -> Path:
    """Converts a checkpoint to the Hugging Face format; `convert_to_hf` gets `options`."""
    stages = {"n_stages": None, "n_layer_per_stage": None}
    options = {**stages, "config_name": None, "fp16": False, "verify": False, **options}
    return convert_to_hf(family(name), ckpt_path=source, save_path=save_path, **options)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path, place: float = 0.5) -> None:
    """Flips a bit of a file; `place` is 0 for the first byte and 1 for the last byte."""
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
