"""Tests that models of the Llama kind have the Hugging Face model's logits and gradients."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from modules.build import initialise_, make_layer
from modules.layers.norm import RMSNorm
from modules.registry import MODELS
from tests.support.models import (
    TOLERANCE,
    check_gradients,
    difference,
    from_hf,
    hf_config,
    make_hf,
)

TIED = {"tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 300.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 4}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True}),
    ("llama", {"mlp_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-2}),
    ("llama", {"head_dim": 14, "num_hidden_layers": 1}),
    ("llama", {"head_dim": None, "hidden_size": 24, "vocab_size": 128}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 33.0}}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    ("llama", {"rope_parameters": {**YARN, "original_max_position_embeddings": 16}}),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False}}),
    ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}, "head_dim": 16}),
    ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 2, "num_key_value_heads": 4}),
    ("mistral", {"sliding_window": 33, "head_dim": 20, "rope_parameters": YARN}),
    ("qwen2", {}),
    ("qwen2", {"sliding_window": 7, "max_window_layers": 1, "use_sliding_window": True}),
    ("qwen2", {"num_key_value_heads": 4, "rope_parameters": YARN}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 14, "attention_bias": True, "rms_norm_eps": 1e-2}),
    ("qwen3", {"sliding_window": 7, "max_window_layers": 2, "use_sliding_window": True}),
]


@pytest.mark.parametrize("tokens", [33, 12])
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_logits_and_gradients(
    name: str, changes: dict[str, Any], tokens: int, tmp_path: Path
) -> None:
    """With 33 tokens, attention is torch's; with 12, it is our attention of short sequences."""
    theirs = make_hf(name, **changes)
    ours = from_hf(name, theirs, tmp_path)
    token_ids = torch.randint(0, theirs.config.vocab_size, (3, tokens))

    expected = theirs(token_ids).logits
    logits = ours(token_ids, None)
    assert difference(logits, expected[:, :-1]) < TOLERANCE
    labels = token_ids[:, 1:].flatten()
    for found in (expected[:, :-1], logits):
        torch.autograd.backward(functional.cross_entropy(found.flatten(0, 1), labels))
    check_gradients(ours, theirs, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_that_of_transformers(dtype: torch.dtype) -> None:
    """Outputs have the same bits; gradients differ by at most two roundings of the type."""
    torch.manual_seed(3)
    theirs, ours = LlamaRMSNorm(48, eps=1e-5), RMSNorm(48, eps=1e-5)
    weight = (torch.randn(48) * 0.2 + 1).to(dtype)
    x, gradient = torch.randn(2, 5, 7, 48).to(dtype)
    found = []
    for norm in (ours, theirs):
        norm.to(dtype).weight.data.copy_(weight)
        given = x.clone().requires_grad_()
        out = norm(given)
        torch.autograd.backward(out, gradient)
        found.append((out, given.grad, norm.weight.grad))
    (out, *grads), (expected, *expected_grads) = found
    assert torch.equal(out, expected)
    for one, other in zip(grads, expected_grads, strict=True):
        assert one is not None
        assert difference(one, other) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_weight_is_initialised(name: str) -> None:
    """A norm that kept the values of its memory would give a loss that is not finite."""
    family, config = MODELS[name].load(), hf_config(name)
    for index in range(config.num_hidden_layers + 2):
        module = make_layer(family, config, index, "cpu")
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)
        initialise_(module, std=0.02, seed=1, index=index)
        for key, parameter in module.named_parameters():
            assert parameter.isfinite().all()
            if key.endswith("norm.weight"):
                assert (parameter == 1.0).all()


def rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 100.0, **fields}}


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("llama", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("llama", {"head_dim": 7}, "head_dim|head size"),
        ("llama", {"hidden_act": "no_such"}, "no_such"),
        ("llama", {"sliding_window": 8}, "sliding_window is 8"),
        ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping is 30.0"),
        ("llama", {"intermediate_size": 0}, "intermediate_size is 0"),
        ("llama", rope(rope_type="proportional"), "rope_type is 'proportional'"),
        ("llama", rope(rope_type="linear", factor=2.0, beta_fast=3), "beta_fast"),
        ("llama", rope(rope_type="linear"), "factor"),
        ("llama", rope(rope_type="default", partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("mistral", {"attention_bias": True}, "attention_bias"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
        ("qwen3", {"model_type": "qwen3_moe"}, "qwen3_moe"),
    ],
)
def test_config_that_is_not_built_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    hf_config(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=named) as caught:
        MODELS[name].load().load_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_class_that_ties_by_default_is_refused(tmp_path: Path) -> None:
    """A config.json without the key tie_word_embeddings has the value of its config class.

    Only the file was looked at. A model whose class ties by default would have been converted with
    a head of its own.
    """
    hf_config("qwen2").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    del raw["tie_word_embeddings"]
    path.write_text(json.dumps(raw))
    family = MODELS["qwen2"].load()
    assert not family.load_config(tmp_path).tie_word_embeddings
    with (
        patch.object(family.config_class, "from_dict", lambda raw: hf_config("qwen2", **TIED)),
        pytest.raises(ValueError, match="tie_word_embeddings is true"),
    ):
        family.load_config(tmp_path)
