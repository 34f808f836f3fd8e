"""The decoder of the Llama kind, by switches (`modules.families.decoder_config` reads them).

A block is a pre-norm transformer layer: RMSNorm, rotary embeddings, grouped key and value heads,
and a gated feed-forward part. Families differ in biases, norms of heads, windows, and sizes.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from modules.attention.causal import causal_attention
from modules.attention.packed_documents import PackedDocuments
from modules.layers.activation import make_activation
from modules.layers.dropout import Keys
from modules.layers.linear import Embedding, Linear
from modules.layers.lm_head import Head
from modules.layers.norm import RMSNorm
from modules.layers.rope_scaling import RopeScaling
from modules.layers.rotary import Rotation, rotate, rotation
from modules.model_sizes import ModelSizes


@dataclass(frozen=True)
class Decoder:
    """The sizes and switches of a decoder.

    inner: the width of the feed-forward part.
    heads, key_heads: the numbers of query heads, and of key and value heads.
    windows: for each block, how many of the last keys a query sees; None for all.
    qkv_bias, output_bias, mlp_bias: whether the projections before and after attention and those of
        the feed-forward part have biases.
    head_norms: whether each query head and each key head has a norm before its rotation.
    """

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    activation: str
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    attention_dropout: float
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False


class DecoderEmbedding(nn.Module):
    """The embedding: maps token ids (rows, seq_len) to activations (rows, seq_len, hidden)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.embed_tokens = Embedding(decoder.vocabulary, decoder.hidden)

    def forward(self, token_ids: Tensor, keys: Keys = None, documents: object = None) -> Tensor:
        out: Tensor = self.embed_tokens(token_ids)
        return out


class DecoderAttention(nn.Module):
    """Causal self-attention with rotary embeddings; several query heads share a key head."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        super().__init__()
        hidden, size = decoder.hidden, decoder.head_size
        width, key_width = decoder.heads * size, decoder.key_heads * size
        self.decoder = decoder
        self.window = decoder.windows[layer]
        self.site = f"{layer}.self_attn.scores"
        self.q_proj = Linear(hidden, width, bias=decoder.qkv_bias)
        self.k_proj = Linear(hidden, key_width, bias=decoder.qkv_bias)
        self.v_proj = Linear(hidden, key_width, bias=decoder.qkv_bias)
        self.o_proj = Linear(width, hidden, bias=decoder.output_bias)
        if decoder.head_norms:
            self.q_norm = RMSNorm(size, eps=decoder.norm_eps)
            self.k_norm = RMSNorm(size, eps=decoder.norm_eps)

    def forward(self, x: Tensor, keys: Keys, documents: PackedDocuments | None) -> Tensor:
        rows, seq_len, _ = x.shape
        query, key, value = (
            projection(x).view(rows, seq_len, -1, self.decoder.head_size)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.decoder.head_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        rotary = self._rotation(x, documents)
        mixed = causal_attention(
            rotate(query.transpose(1, 2), rotary),
            rotate(key.transpose(1, 2), rotary),
            value.transpose(1, 2),
            dropout=self.decoder.attention_dropout,
            site=self.site,
            keys=keys,
            documents=documents,
            window=self.window,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, seq_len, -1))
        return out

    def _rotation(self, x: Tensor, documents: PackedDocuments | None) -> Rotation:
        decoder = self.decoder
        rotary = rotation(
            x.shape[1],
            decoder.head_size,
            decoder.rope_base,
            pairs=False,
            dtype=x.dtype,
            device=x.device,
            scaling=decoder.rope_scaling,
        )
        return rotary if documents is None else documents.rotation(rotary)


class DecoderMLP(nn.Module):
    """The gated feed-forward part of a block (Shazeer, arXiv 2002.05202)."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        hidden, inner, bias = decoder.hidden, decoder.inner, decoder.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)
        self.act_fn = make_activation(decoder.activation)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderBlock(nn.Module):
    """A transformer layer: maps activations (rows, seq_len, hidden) to the same shape."""

    def __init__(self, decoder: Decoder, layer: int) -> None:
        super().__init__()
        self.window = decoder.windows[layer]  # the memory plan takes blocks for equal by this
        self.input_layernorm = RMSNorm(decoder.hidden, eps=decoder.norm_eps)
        self.self_attn = DecoderAttention(decoder, layer)
        self.post_attention_layernorm = RMSNorm(decoder.hidden, eps=decoder.norm_eps)
        self.mlp = DecoderMLP(decoder)

    def forward(
        self, x: Tensor, keys: Keys = None, documents: PackedDocuments | None = None
    ) -> Tensor:
        attended: Tensor = x + self.self_attn(self.input_layernorm(x), keys, documents)
        out: Tensor = attended + self.mlp(self.post_attention_layernorm(attended))
        return out


class DecoderHead(Head):
    """The head; its modules are named as in Hugging Face's files."""

    norm_name, projection_name = "norm", "lm_head"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.norm = RMSNorm(decoder.hidden, eps=decoder.norm_eps)
        self.lm_head = Linear(decoder.hidden, decoder.vocabulary, bias=False)


def decoder_sizes(decoder: Decoder) -> ModelSizes:
    """Returns the sizes of a decoder."""
    windows = [window for window in decoder.windows if window is not None]
    width = (2 * decoder.heads + 2 * decoder.key_heads) * decoder.head_size
    return ModelSizes(
        layers=decoder.layers,
        hidden=decoder.hidden,
        inner=decoder.inner,
        vocabulary=decoder.vocabulary,
        block_weights=decoder.hidden * (width + 3 * decoder.inner),
        heads=decoder.heads,
        head_size=decoder.head_size,
        window=windows[0] if windows else 0,
        window_layers=len(windows),
    )
