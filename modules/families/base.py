"""What a model family is: three kinds of module, their names in Hugging Face files, its config.

A family's file (`modules/families/gptneox.py`, say) defines `FAMILY`. A model is an embedding,
then blocks,
then a head. Each is one layer shard, and all are called alike: `module(x, keys, documents)`, where
`keys` are the dropout keys of the rows of `x` (`modules.layers.dropout`), or None for no dropout,
and
`documents` those of the rows (`modules.attention.packed_documents`), or None where attention goes
over whole rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from common.text import one_line


@dataclass(frozen=True)
class Family:
    """One model family.

    `hf_block` maps a block's shard key to its Hugging Face key, with `{layer}` in it; `hf_ends`
    the keys of the embedding and the head. `hf_aliases` maps other spellings met in Hugging Face
    files to the one in those tables. `buffers` matches keys, in shards and in Hugging Face files,
    that are no weights and are ignored.
    """

    name: str
    config_class: type[PreTrainedConfig]
    make_embedding: Callable[[Any], nn.Module]
    make_block: Callable[[Any, int], nn.Module]
    make_head: Callable[[Any], nn.Module]
    hf_embedding: Mapping[str, str]
    hf_block: Mapping[str, str]
    hf_head: Mapping[str, str]
    buffers: re.Pattern[str]
    check_config: Callable[[Any], None]
    hf_aliases: Mapping[str, str] = field(default_factory=dict)

    def load_config(self, folder: Path) -> Any:
        """The checked config of `folder/config.json`.

        Raises ValueError, naming the file, for another model type, an unreadable file, or a field
        that changes the mathematics and is not built.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file (a model folder has one)") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable as JSON: {error}") from error
        expected = self.config_class.model_type
        if not isinstance(raw, dict) or raw.get("model_type") != expected:
            found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
            raise ValueError(f"{path}: model_type is {found!r}, but {self.name} needs {expected!r}")
        if raw.get("quantization_config"):
            raise ValueError(f"{path}: quantization_config is set: quantized models are not built")
        if raw.get("tie_word_embeddings"):
            raise ValueError(f"{path}: tie_word_embeddings is true: tied weights are not built yet")
        try:
            config = self.config_class.from_dict(raw)
            self.check_config(config)
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            raise ValueError(f"{path}: {one_line(error)}") from error
        return config


def check_activation(field_name: str, activation: str) -> None:
    """Raises ValueError for an activation that is unknown or has weights of its own."""
    if activation not in ACT2FN:
        raise ValueError(f"{field_name} is {activation!r}, unknown to transformers' ACT2FN")
    if list(ACT2FN[activation].parameters()):
        raise ValueError(f"{field_name} is {activation!r}, which has weights: it is not built")


def check_heads(config: Any) -> None:
    """Raises ValueError where the hidden size does not split evenly over the heads."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise ValueError(f"hidden size {hidden} is no multiple of the {heads} attention heads")
    head_dim = getattr(config, "head_dim", None)
    if head_dim not in (None, hidden // heads):
        raise ValueError(f"head_dim is {head_dim}, not hidden size / heads: it is not built")
