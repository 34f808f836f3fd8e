"""GPT-J (Wang and Komatsuzaki, 2021): attention and feed-forward in parallel, with one norm."""

import re
from typing import Any

from torch import Tensor, nn
from transformers import GPTJConfig

from modules.attention.causal import causal_attention
from modules.attention.packed_documents import PackedDocuments
from modules.families.base import Family, check_heads, config_size, dense_sizes
from modules.layers.activation import check_activation, make_activation
from modules.layers.dropout import KeyedDropout, Keys
from modules.layers.linear import Embedding, Linear
from modules.layers.lm_head import Head
from modules.layers.rotary import rotate, rotation
from modules.model_sizes import ModelSizes

ROTARY_BASE = 10000.0


class GPTJEmbedding(nn.Module):
    """The embedding: maps token ids (rows, seq_len) to activations (rows, seq_len, hidden)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.dropout = KeyedDropout(config.embd_pdrop, "embedding")

    def forward(self, token_ids: Tensor, keys: Keys = None, documents: object = None) -> Tensor:
        out: Tensor = self.dropout(self.wte(token_ids), keys)
        return out


class GPTJAttention(nn.Module):
    """Causal self-attention; rotary embeddings rotate the first `rotary_dim` entries of a head."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        hidden = config.n_embd
        self.head_size = hidden // config.n_head
        self.rotary_dim = config.rotary_dim
        self.dropout = float(config.attn_pdrop)
        self.site = f"{layer}.attn.scores"
        self.q_proj = Linear(hidden, hidden, bias=False)
        self.k_proj = Linear(hidden, hidden, bias=False)
        self.v_proj = Linear(hidden, hidden, bias=False)
        self.out_proj = Linear(hidden, hidden, bias=False)
        self.resid_dropout = KeyedDropout(config.resid_pdrop, f"{layer}.attn")

    def _heads(self, x: Tensor) -> Tensor:
        rows, seq_len, _ = x.shape
        return x.view(rows, seq_len, -1, self.head_size).transpose(1, 2)

    def forward(self, x: Tensor, keys: Keys, documents: PackedDocuments | None) -> Tensor:
        rows, seq_len, _ = x.shape
        rotary = rotation(
            seq_len, self.rotary_dim, ROTARY_BASE, pairs=True, dtype=x.dtype, device=x.device
        )
        if documents is not None:
            rotary = documents.rotation(rotary)
        mixed = causal_attention(
            rotate(self._heads(self.q_proj(x)), rotary),
            rotate(self._heads(self.k_proj(x)), rotary),
            self._heads(self.v_proj(x)),
            dropout=self.dropout,
            site=self.site,
            keys=keys,
            documents=documents,
        )
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(rows, seq_len, -1))
        out = self.resid_dropout(out, keys)
        return out


class GPTJMLP(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        inner = _inner_size(config)
        self.fc_in = Linear(config.n_embd, inner)
        self.fc_out = Linear(inner, config.n_embd)
        self.act = make_activation(config.activation_function)
        self.dropout = KeyedDropout(config.resid_pdrop, f"{layer}.mlp")

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        out: Tensor = self.dropout(self.fc_out(self.act(self.fc_in(x))), keys)
        return out


class GPTJBlock(nn.Module):
    """A transformer layer: maps activations (rows, seq_len, hidden) to the same shape."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = GPTJAttention(config, layer)
        self.mlp = GPTJMLP(config, layer)

    def forward(
        self, x: Tensor, keys: Keys = None, documents: PackedDocuments | None = None
    ) -> Tensor:
        normed = self.ln_1(x)
        out: Tensor = self.attn(normed, keys, documents) + self.mlp(normed, keys) + x
        return out


class GPTJHead(Head):
    """The head; its modules are named as in GPT-J's Hugging Face files."""

    norm_name, projection_name = "ln_f", "lm_head"

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.lm_head = Linear(config.n_embd, config.vocab_size)


def _inner_size(config: Any) -> int:
    """Returns the feed-forward part's width: `n_inner`; if it is None, 4 times the hidden size."""
    return 4 * config.n_embd if config.n_inner is None else config_size(config, "n_inner")


def model_sizes(config: Any) -> ModelSizes:
    """Returns the sizes of a model from its config."""
    return dense_sizes(config, inner=_inner_size(config))


def check_config(config: Any) -> None:
    """Raises ValueError for a config that is invalid or that these modules do not support."""
    check_heads(config)
    check_activation("activation_function", config.activation_function)
    head_size, rotary = config.n_embd // config.n_head, config.rotary_dim
    if not isinstance(rotary, int) or not 0 < rotary <= head_size or rotary % 2:
        raise ValueError(
            f"rotary_dim is {rotary}, expected an even number from 2 to the head's size {head_size}"
        )
    for name in ("rope_scaling", "rope_parameters"):
        if getattr(config, name, None):
            raise ValueError(f"{name} is set: rope scaling is not supported")


_BLOCK_KEYS = (
    "ln_1.weight",
    "ln_1.bias",
    "attn.q_proj.weight",
    "attn.k_proj.weight",
    "attn.v_proj.weight",
    "attn.out_proj.weight",
    "mlp.fc_in.weight",
    "mlp.fc_in.bias",
    "mlp.fc_out.weight",
    "mlp.fc_out.bias",
)

FAMILY = Family(
    name="gptj",
    config_class=GPTJConfig,
    make_embedding=GPTJEmbedding,
    make_block=GPTJBlock,
    make_head=GPTJHead,
    hf_embedding={"wte.weight": "transformer.wte.weight"},
    hf_block={key: f"transformer.h.{{layer}}.{key}" for key in _BLOCK_KEYS},
    hf_head={
        "ln_f.weight": "transformer.ln_f.weight",
        "ln_f.bias": "transformer.ln_f.bias",
        "lm_head.weight": "lm_head.weight",
        "lm_head.bias": "lm_head.bias",
    },
    buffers=re.compile(r"(^|\.)attn\.(bias|masked_bias|embed_positions)$"),
    sizes=model_sizes,
    check_config=check_config,
)
