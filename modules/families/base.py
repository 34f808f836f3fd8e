"""The interface of a model family: its modules, their Hugging Face names, its config and sizes.

A family's file (for example `modules/families/gptneox.py`) defines `FAMILY`. A model is an
embedding, then blocks, then a head. Each of these modules has one file in the layer shards and is
called as `module(x, keys, documents)`. `keys` has a dropout key for each row of `x`
(`modules.layers.dropout`); it is None for no dropout. `documents` tells where each document starts
in the rows (`modules.attention.packed_documents`), because tokens attend only to their own
document; it is None if attention covers complete rows.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from common.files import read_json_object
from common.text import one_line
from modules.model_sizes import ModelSizes


@dataclass(frozen=True)
class Family:
    """A model family; a key is the name of a tensor in a layer shard or in a Hugging Face file.

    sizes: returns the sizes from a config.
    hf_embedding, hf_block, hf_head: key in a layer shard -> key in Hugging Face files; in hf_block,
        the Hugging Face keys contain `{layer}` in place of the block's number.
    buffers: matches the keys of buffers; a tensor with such a key is ignored in both kinds of file.
    check_config: raises ValueError for a config that needs an unsupported computation.
    hf_aliases: another key in some Hugging Face files -> the Hugging Face key in the tables above.
    """

    name: str
    config_class: type[PreTrainedConfig]
    make_embedding: Callable[[Any], nn.Module]
    make_block: Callable[[Any, int], nn.Module]
    make_head: Callable[[Any], nn.Module]
    sizes: Callable[[Any], ModelSizes]
    hf_embedding: Mapping[str, str]
    hf_block: Mapping[str, str]
    hf_head: Mapping[str, str]
    buffers: re.Pattern[str]
    check_config: Callable[[Any], None]
    hf_aliases: Mapping[str, str] = field(default_factory=dict)

    def load_config(self, folder: Path) -> Any:
        """Loads and checks the config of `folder/config.json`.

        Raises ValueError, which names the file, if the file cannot be read, has another model type,
        or has a field that is invalid or not supported.
        """
        path = folder / "config.json"
        if not path.exists():
            raise ValueError(f"{path}: no such file (a model folder needs one)")
        raw, expected = read_json_object(path), self.config_class.model_type
        if raw.get("model_type") != expected:
            raise ValueError(
                f"{path}: model_type is {raw.get('model_type')!r}, but {self.name} needs "
                f"{expected!r}"
            )
        if raw.get("quantization_config"):
            raise ValueError(f"{path}: quantization_config is set: no support for quantized models")
        try:
            config = self.config_class.from_dict(raw)
            if config.tie_word_embeddings:  # the file's value or, without one, the class's
                raise ValueError("tie_word_embeddings is true: tied weights are not supported")
            self.check_config(config)
            self.sizes(config)
        except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
            raise ValueError(f"{path}: {one_line(error)}") from error
        return config


def config_size(config: Any, key: str) -> int:
    """Returns the size `key` of a config; raises ValueError unless it is an integer above 0."""
    size = getattr(config, key)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{key} is {size!r}, expected an integer above 0")
    return size


def dense_sizes(config: Any, *, inner: int) -> ModelSizes:
    """Returns the sizes of a model; `inner` is the width of the feed-forward part.

    A block has four matrices of hidden x hidden and two matrices of hidden x inner.
    """
    hidden = config_size(config, "hidden_size")
    heads = config_size(config, "num_attention_heads")
    return ModelSizes(
        layers=config_size(config, "num_hidden_layers"),
        hidden=hidden,
        inner=inner,
        vocabulary=config_size(config, "vocab_size"),
        block_weights=hidden * (4 * hidden + 2 * inner),
        heads=heads,
        head_size=hidden // heads,
    )


def check_heads(config: Any) -> None:
    """Raises ValueError unless hidden_size = heads * n (n: integer) and head_dim is n or None."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if hidden % heads:
        raise ValueError(f"hidden size {hidden} is not a multiple of {heads} attention heads")
    head_dim = getattr(config, "head_dim", None)
    if head_dim not in (None, hidden // heads):
        raise ValueError(f"head_dim is {head_dim}, not hidden size / heads: not supported")
