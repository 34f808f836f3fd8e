"""Checkpoint files in the format of an older system (a predecessor, see docs/glossary.md).

Names of tensors come from lists in this module, not from the tables in modules.families. So a
wrong name in one of those tables makes a test fail.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

POSITIONS, LAYERS = 32, 3
CONFIGS: dict[str, dict[str, Any]] = {
    "gptj": json.loads("""{
        "model_type": "gptj", "n_embd": 16, "n_head": 2, "n_layer": 3, "n_positions": 32,
        "rotary_dim": 4, "vocab_size": 53, "bos_token_id": 0, "eos_token_id": 0,
        "tie_word_embeddings": false
    }"""),
    "gptneox": json.loads("""{
        "model_type": "gpt_neox", "hidden_size": 16, "num_attention_heads": 2, "rotary_pct": 0.25,
        "num_hidden_layers": 3, "max_position_embeddings": 32, "intermediate_size": 64,
        "vocab_size": 53, "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32"
    }"""),
}
Shapes = dict[str, tuple[int, ...]]


def read_shapes(lines: str) -> Shapes:
    """Reads pairs of a tensor's name and the tensor's sizes, such as `wte.weight 53x16`."""
    words = lines.split()
    pairs = zip(words[::2], words[1::2], strict=True)
    return {name: tuple(map(int, sizes.split("x"))) for name, sizes in pairs}


EMBEDDING = {
    "gptj": read_shapes("wte.weight 53x16"),
    "gptneox": read_shapes("embed_in.weight 53x16"),
}
BLOCK = {
    "gptj": read_shapes("""
        ln_1.weight 16 ln_1.bias 16
        attn.q_proj.weight 16x16 attn.k_proj.weight 16x16 attn.v_proj.weight 16x16
        attn.out_proj.weight 16x16
        mlp.fc_in.weight 64x16 mlp.fc_in.bias 64 mlp.fc_out.weight 16x64 mlp.fc_out.bias 16
    """),
    "gptneox": read_shapes("""
        input_layernorm.weight 16 input_layernorm.bias 16
        post_attention_layernorm.weight 16 post_attention_layernorm.bias 16
        attention.query_key_value.weight 48x16 attention.query_key_value.bias 48
        attention.dense.weight 16x16 attention.dense.bias 16
        mlp.dense_h_to_4h.weight 64x16 mlp.dense_h_to_4h.bias 64
        mlp.dense_4h_to_h.weight 16x64 mlp.dense_4h_to_h.bias 16
    """),
}
HEAD = {
    "gptj": read_shapes("ln_f.weight 16 ln_f.bias 16 lm_head.weight 53x16 lm_head.bias 53"),
    "gptneox": read_shapes(
        "final_layer_norm.weight 16 final_layer_norm.bias 16 embed_out.weight 53x16"
    ),
}
HF_BLOCK = {"gptj": "transformer.h.{}.{}", "gptneox": "gpt_neox.layers.{}.{}"}
HF_ENDS = """
    transformer.wte.weight transformer.ln_f.weight transformer.ln_f.bias
    lm_head.weight lm_head.bias
    gpt_neox.embed_in.weight gpt_neox.final_layer_norm.weight gpt_neox.final_layer_norm.bias
    embed_out.weight
"""
HF_NAMES = {".".join(name.split(".")[-2:]): name for name in HF_ENDS.split()}


def mask(dtype: torch.dtype) -> Tensor:
    return torch.tril(torch.ones(POSITIONS, POSITIONS, dtype=dtype))[None, None]


def buffers(name: str) -> dict[str, Tensor]:
    if name == "gptj":
        return {"attn.bias": mask(torch.uint8), "attn.masked_bias": torch.tensor(-1e9).half()}
    return {
        "attention.bias": mask(torch.bool),
        "attention.masked_bias": torch.tensor(float("-inf")).half(),  # -1e9 in fp16
        "attention.rotary_emb.inv_freq": torch.ones(2).half(),
    }


def weights(shapes: Shapes, generator: torch.Generator) -> dict[str, Tensor]:
    return {k: torch.randn(v, generator=generator).half() for k, v in shapes.items()}


def make_modules(name: str) -> list[dict[str, Tensor]]:
    """Returns the fp16 weights, without buffers, of the embedding, three blocks and the head."""
    generator = torch.Generator().manual_seed(5)
    shapes = [EMBEDDING[name], *[BLOCK[name]] * LAYERS, HEAD[name]]
    return [weights(module, generator) for module in shapes]


def expected_hf(name: str, modules: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    expected = {HF_NAMES[k]: v for end in (modules[0], modules[-1]) for k, v in end.items()}
    for layer, block in enumerate(modules[1:-1]):
        expected |= {HF_BLOCK[name].format(layer, key): value for key, value in block.items()}
    return expected


def save_stage(path: Path, name: str, modules: list[dict[str, Tensor]]) -> None:
    state: dict[str, Tensor] = {}
    for j, module in enumerate(modules):
        is_block = set(module) == set(BLOCK[name])
        held = {**module, **buffers(name)} if is_block else module
        state |= {f"{j}.{key}": value for key, value in held.items()}
    torch.save(state, path)


def make_checkpoint(name: str, folder: Path, meta: str | None = '{"step": 20}') -> None:
    """Writes a checkpoint of two stages: (embedding, two blocks) and (one block, head)."""
    modules = make_modules(name)
    folder.mkdir(parents=True)
    save_stage(folder / "prank_0_checkpoint.pt", name, modules[:3])
    save_stage(folder / "prank_1_checkpoint.pt", name, modules[3:])
    for stage in (0, 1):
        torch.save({}, folder / f"prank_{stage}_optimizer.pt")
    if meta is not None:
        (folder / "meta.json").write_text(meta)


def write_config(name: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    (folder / "tokenizer.json").write_text("{}")
    return folder
