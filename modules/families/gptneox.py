"""GPT-NeoX (Black et al., arXiv 2204.06745) and models that differ only in their config.

Such models are Pythia, Dolly, RedPajama-INCITE and GPT-NeoXT-Chat.
"""

import re
from typing import Any

from torch import Tensor, nn
from transformers import GPTNeoXConfig

from modules.attention.causal import causal_attention
from modules.attention.packed_documents import PackedDocuments
from modules.families.base import Family, check_heads, config_size, dense_sizes
from modules.layers.activation import check_activation, make_activation
from modules.layers.dropout import KeyedDropout, Keys
from modules.layers.linear import Embedding, Linear
from modules.layers.lm_head import Head
from modules.layers.rotary import rotation, split_and_rotate
from modules.model_sizes import ModelSizes


class GPTNeoXEmbedding(nn.Module):
    """The embedding: maps token ids (rows, seq_len) to activations (rows, seq_len, hidden)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_in = Embedding(config.vocab_size, config.hidden_size)
        self.dropout = KeyedDropout(config.hidden_dropout, "embedding")

    def forward(self, token_ids: Tensor, keys: Keys = None, documents: object = None) -> Tensor:
        out: Tensor = self.dropout(self.embed_in(token_ids), keys)
        return out


class GPTNeoXAttention(nn.Module):
    """Causal self-attention; one weight holds query, key and value of each head side by side."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.head_size = hidden // config.num_attention_heads
        self.rotary_dim = int(self.head_size * config.rope_parameters["partial_rotary_factor"])
        self.rotary_base = float(config.rope_parameters["rope_theta"])
        self.dropout = float(config.attention_dropout)
        self.site = f"{layer}.attention.scores"
        self.query_key_value = Linear(hidden, 3 * hidden, bias=bias)
        self.dense = Linear(hidden, hidden, bias=bias)

    def forward(self, x: Tensor, keys: Keys, documents: PackedDocuments | None) -> Tensor:
        rows, seq_len, _ = x.shape
        heads = self.query_key_value(x).view(rows, seq_len, -1, 3 * self.head_size).transpose(1, 2)
        rotary = rotation(
            seq_len, self.rotary_dim, self.rotary_base, pairs=False, dtype=x.dtype, device=x.device
        )
        if documents is not None:
            rotary = documents.rotation(rotary)
        query, key, value = split_and_rotate(heads, rotary)
        mixed = causal_attention(
            query, key, value, dropout=self.dropout, site=self.site, keys=keys, documents=documents
        )
        out: Tensor = self.dense(mixed.transpose(1, 2).reshape(rows, seq_len, -1))
        return out


class GPTNeoXMLP(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense_h_to_4h = Linear(config.hidden_size, config.intermediate_size)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size)
        self.act = make_activation(config.hidden_act)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.dense_4h_to_h(self.act(self.dense_h_to_4h(x)))
        return out


class GPTNeoXBlock(nn.Module):
    """A transformer layer, with parallel or sequential residual.

    It maps activations (rows, seq_len, hidden) to the same shape.
    """

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.layer_norm_eps
        self.parallel = bool(config.use_parallel_residual)
        self.input_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.LayerNorm(hidden, eps=eps)
        self.attention = GPTNeoXAttention(config, layer)
        self.mlp = GPTNeoXMLP(config)
        self.attention_dropout = KeyedDropout(config.hidden_dropout, f"{layer}.attention")
        self.mlp_dropout = KeyedDropout(config.hidden_dropout, f"{layer}.mlp")

    def forward(
        self, x: Tensor, keys: Keys = None, documents: PackedDocuments | None = None
    ) -> Tensor:
        attended: Tensor = self.attention(self.input_layernorm(x), keys, documents)
        attended = self.attention_dropout(attended, keys)
        residual = x if self.parallel else attended + x
        fed: Tensor = self.mlp(self.post_attention_layernorm(residual))
        fed = self.mlp_dropout(fed, keys)
        return fed + attended + x if self.parallel else fed + residual


class GPTNeoXHead(Head):
    """The head; its modules are named as in GPT-NeoX's Hugging Face files."""

    norm_name, projection_name = "final_layer_norm", "embed_out"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.embed_out = Linear(config.hidden_size, config.vocab_size, bias=False)


def model_sizes(config: Any) -> ModelSizes:
    """Returns the sizes of a model from its config."""
    return dense_sizes(config, inner=config_size(config, "intermediate_size"))


def check_config(config: Any) -> None:
    """Raises ValueError for a config that is invalid or that these modules do not support."""
    check_heads(config)
    check_activation("hidden_act", config.hidden_act)
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}: rope scaling is not supported")


_BLOCK_KEYS = (
    "input_layernorm.weight",
    "input_layernorm.bias",
    "post_attention_layernorm.weight",
    "post_attention_layernorm.bias",
    "attention.query_key_value.weight",
    "attention.query_key_value.bias",
    "attention.dense.weight",
    "attention.dense.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
    "mlp.dense_4h_to_h.weight",
    "mlp.dense_4h_to_h.bias",
)

FAMILY = Family(
    name="gptneox",
    config_class=GPTNeoXConfig,
    make_embedding=GPTNeoXEmbedding,
    make_block=GPTNeoXBlock,
    make_head=GPTNeoXHead,
    hf_embedding={"embed_in.weight": "gpt_neox.embed_in.weight"},
    hf_block={key: f"gpt_neox.layers.{{layer}}.{key}" for key in _BLOCK_KEYS},
    hf_head={
        "final_layer_norm.weight": "gpt_neox.final_layer_norm.weight",
        "final_layer_norm.bias": "gpt_neox.final_layer_norm.bias",
        "embed_out.weight": "embed_out.weight",
    },
    hf_aliases={"lm_head.weight": "embed_out.weight"},
    buffers=re.compile(
        r"(^|\.)attention\.(bias|masked_bias|rotary_emb\.inv_freq)$|^gpt_neox\.rotary_emb\.inv_freq$"
    ),
    sizes=model_sizes,
    check_config=check_config,
)
