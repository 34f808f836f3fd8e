"""Tests that models of the Llama kind have the Hugging Face model's logits and gradients."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from modules.registry import MODELS
from tests.support.models import TOLERANCE, difference, from_hf, hf_keys, hf_parameter, make_hf

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
    for index, module in enumerate(ours):
        keys = hf_keys(MODELS[name].load(), theirs.config.num_hidden_layers, index)
        for key, parameter in module.named_parameters():
            grad = hf_parameter(theirs, keys[key]).grad
            assert parameter.grad is not None
            assert grad is not None
            assert difference(parameter.grad, grad) < TOLERANCE, f"module {index}: {key}"
