"""Tiny models in the Hugging Face format, and our modules with their weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoint.conversion.from_hf import convert_from_hf
from modules.families.base import Family
from modules.registry import MODELS
from modules.stage_model import StageModel
from tests.support.data import tokenizer

TOLERANCE = 1e-5  # of the tensor's largest absolute value: the project's tolerance in fp32
NEOX = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPTJ = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "rotary_dim": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, dict[str, Any]] = {"gptneox": NEOX, "gptj": GPTJ, "llama": LLAMA}
CONFIGS |= {"mistral": {**LLAMA, "sliding_window": 7}, "qwen3": LLAMA}
CONFIGS["qwen2"] = {key: value for key, value in LLAMA.items() if key != "head_dim"}


def hf_config(family_name: str, **changes: Any) -> Any:
    """Returns a tiny config of a family, with changes."""
    return MODELS[family_name].load().config_class(**{**CONFIGS[family_name], **changes})


def make_hf(family_name: str, *, seed: int = 0, **changes: Any) -> Any:
    """Builds a Hugging Face model of random weights, biases and norms (zeros would hide errors)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(family_name, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name or "layernorm" in name or "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4.0)
    return model.train()


def make_shards(
    folder: Path, name: str, family: str, changes: dict[str, Any], *, place: str = "shards"
) -> Any:
    """Makes a model in `folder`/hf/`name` and its layer shards in `folder`/`place`/`name`."""
    model = make_hf(family, **{"vocab_size": 400, **changes})
    model.save_pretrained(folder / "hf" / name)
    tokenizer().save_pretrained(folder / "hf" / name)
    source, target = str(folder / "hf" / name), folder / place
    convert_from_hf(MODELS[family].load(), model_name=source, save_dir=target, dtype="keep")
    return model


def hf_keys(family: Family, num_layers: int, index: int) -> dict[str, str]:
    """Returns the map from shard keys to Hugging Face keys for module `index`."""
    if index == 0:
        return dict(family.hf_embedding)
    if index == num_layers + 1:
        return dict(family.hf_head)
    return {key: name.format(layer=index - 1) for key, name in family.hf_block.items()}


def hf_parameter(model: Any, key: str) -> Tensor:
    """Returns a parameter of a Hugging Face model by its name in Hugging Face's files."""
    if key == "embed_out.weight":
        weight: Tensor = model.get_output_embeddings().weight
        return weight
    parameter: Tensor = model.get_parameter(key)
    return parameter


def from_hf(
    family_name: str, model: Any, folder: Path, *, device: torch.device | str = "cpu"
) -> StageModel:
    """Builds the whole model as one stage of our modules, with a Hugging Face model's weights."""
    model.config.save_pretrained(folder)
    family = MODELS[family_name].load()
    config = family.load_config(folder)
    layers = config.num_hidden_layers
    ours = StageModel(family, config, range(layers + 2), device=device)
    with torch.no_grad():
        for index, module in enumerate(ours):
            keys = hf_keys(family, layers, index)
            for name, parameter in module.named_parameters():
                parameter.copy_(hf_parameter(model, keys[name]))
    return ours


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the tensors' largest difference divided by the largest absolute value of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def check_gradients(ours: StageModel, theirs: Any, family_name: str) -> None:
    """Asserts that each weight has the gradient of the Hugging Face model `theirs`."""
    num_layers = theirs.config.num_hidden_layers
    for index, module in enumerate(ours):
        keys = hf_keys(MODELS[family_name].load(), num_layers, index)
        for key, parameter in module.named_parameters():
            gradient = hf_parameter(theirs, keys[key]).grad
            assert parameter.grad is not None
            assert gradient is not None
            assert difference(parameter.grad, gradient) < TOLERANCE, f"module {index}: {key}"
