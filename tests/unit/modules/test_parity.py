"""Tests that GPT-J and GPT-NeoX have the Hugging Face model's logits and gradients; dropout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from modules.layers.dropout import KeyedDropout
from modules.registry import MODELS
from tests.support.models import (
    TOLERANCE,
    check_gradients,
    difference,
    from_hf,
    make_hf,
)

ROPE = {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.75}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("gptneox", {}),
    ("gptneox", {"use_parallel_residual": False}),
    ("gptneox", {"attention_bias": False}),
    ("gptneox", {"attention_bias": False, "use_parallel_residual": False}),
    ("gptneox", {"rotary_pct": 1.0}),
    ("gptneox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
    ("gptneox", {"rotary_pct": 0.01}),
    ("gptneox", {"rope_parameters": ROPE}),
    ("gptneox", {"hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 100}),
    ("gptneox", {"hidden_size": 40, "num_attention_heads": 1, "vocab_size": 128}),
    ("gptneox", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
    ("gptneox", {"hidden_act": "gelu_fast"}),
    ("gptneox", {"hidden_act": "relu"}),
    ("gptneox", {"hidden_act": "silu"}),
    ("gptneox", {"num_hidden_layers": 1}),
    ("gptj", {}),
    ("gptj", {"rotary_dim": 8}),
    ("gptj", {"rotary_dim": 2, "n_inner": 50}),
    ("gptj", {"n_embd": 48, "n_head": 3, "rotary_dim": 6, "vocab_size": 128}),
    ("gptj", {"activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    ("gptj", {"activation_function": "relu"}),
    ("gptj", {"n_layer": 1}),
]


@pytest.mark.parametrize(("name", "changes"), CASES)
def test_logits_and_gradients(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_hf(name, **changes)
    ours = from_hf(name, theirs, tmp_path)
    tokens = torch.randint(0, theirs.config.vocab_size, (3, 33))

    expected = theirs(tokens).logits
    logits = ours(tokens, None)
    assert difference(logits, expected[:, :-1]) < TOLERANCE
    labels = tokens[:, 1:].flatten()
    for found in (expected[:, :-1], logits):
        torch.autograd.backward(functional.cross_entropy(found.flatten(0, 1), labels))
    check_gradients(ours, theirs, name)


@pytest.mark.parametrize("activation", sorted(ACT2FN))
def test_activations_are_those_of_transformers_or_refused(activation: str, tmp_path: Path) -> None:
    theirs = make_hf("gptneox", num_hidden_layers=1, hidden_act=activation)
    weighted = list(ACT2FN[activation].parameters())
    if weighted:
        with pytest.raises(ValueError, match="hidden_act"):
            from_hf("gptneox", theirs, tmp_path)
        return
    ours = from_hf("gptneox", theirs, tmp_path)
    tokens = torch.randint(0, 97, (2, 9))
    assert difference(ours(tokens, None), theirs(tokens).logits[:, :-1]) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gptneox", {"hidden_dropout": 0.3}),
        ("gptneox", {"attention_dropout": 0.3}),
        ("gptj", {"resid_pdrop": 0.3}),
        ("gptj", {"embd_pdrop": 0.3}),
        ("gptj", {"attn_pdrop": 0.3}),
        ("llama", {"attention_dropout": 0.3}),
        ("mistral", {"attention_dropout": 0.3}),  # has a window
    ],
)
def test_dropout_hangs_on_the_sequence_alone(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    ours = from_hf(name, make_hf(name, **changes), tmp_path)
    tokens = torch.randint(0, 97, (3, 12))
    together = ours(tokens, (7, 8, 9))
    torch.rand(5)  # other random draws must not matter
    for row in range(3):
        alone = ours(tokens[row : row + 1], (7 + row,))
        assert torch.allclose(alone[0], together[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours(tokens, (7, 8, 10))[2], together[2], atol=1e-3)
    assert torch.allclose(ours(tokens, None), ours(tokens, None))
    assert not torch.allclose(ours(tokens, None), together, atol=1e-3)


def test_dropout_keeps_the_mean() -> None:
    out = KeyedDropout(0.25, "here")(torch.ones(64, 4096), range(64))
    assert out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    # 262144 draws with a standard deviation of 0.577: the mean has 0.0011.
    assert abs(out.mean().item() - 1.0) < 0.006


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gptneox", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ("gptneox", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope"),
        ("gptneox", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("gptneox", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("gptneox", {"hidden_size": 33}, "heads"),
        ("gptneox", {"hidden_act": "no_such"}, "no_such"),
        ("gptneox", {"model_type": "gptj"}, "gptj"),
        ("gptneox", {"num_hidden_layers": "many"}, "num_hidden_layers"),
        ("gptj", {"rotary_dim": 0}, "rotary_dim"),
        ("gptj", {"rotary_dim": 3}, "rotary_dim"),
        ("gptj", {"rotary_dim": 64}, "rotary_dim"),
        ("gptj", {"rotary_dim": None}, "rotary_dim"),
        ("gptj", {"n_head": 5}, "heads"),
        ("gptj", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_config_that_is_not_built_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    make_hf(name).config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    if "rope_scaling" in changes:
        raw.pop("rope_parameters", None)
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=named) as caught:
        MODELS[name].load().load_config(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_old_spelling_of_the_rotation(tmp_path: Path) -> None:
    """rotary_pct and rotary_emb_base, which configs had before transformers 5, are still read."""
    make_hf("gptneox").config.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"]
    path.write_text(json.dumps({**raw, "rotary_pct": 0.5, "rotary_emb_base": 123}))
    config = MODELS["gptneox"].load().load_config(tmp_path)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert config.rope_parameters["rope_theta"] == 123
