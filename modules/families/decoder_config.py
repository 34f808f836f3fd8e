"""From the config of a model of the Llama kind to the switches of its decoder, and its family.

The Hugging Face files of these models have the same keys, so one table serves them all; a layer
shard has the keys of a Hugging Face layer without its prefix.
"""

import re
from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedConfig

from modules.families.base import Family, config_size
from modules.families.decoder import (
    Decoder,
    DecoderBlock,
    DecoderEmbedding,
    DecoderHead,
    decoder_sizes,
)
from modules.layers.activation import check_activation
from modules.layers.rope_scaling import read_scaling


def read_decoder(config: Any, **switches: Any) -> Decoder:
    """Returns the decoder of a config; `switches` are those that the family reads by itself.

    Raises:
        ValueError: a field is invalid, or needs a computation that these modules lack.
    """
    layers = config_size(config, "num_hidden_layers")
    rope = config.rope_parameters
    return Decoder(
        **{
            "vocabulary": config_size(config, "vocab_size"),
            "hidden": config_size(config, "hidden_size"),
            "inner": config_size(config, "intermediate_size"),
            "layers": layers,
            "heads": config_size(config, "num_attention_heads"),
            "key_heads": config_size(config, "num_key_value_heads"),
            "head_size": head_size(config),
            "activation": config.hidden_act,
            "norm_eps": float(config.rms_norm_eps),
            "rope_base": float(rope["rope_theta"]),
            "rope_scaling": read_scaling(rope, config.max_position_embeddings),
            "attention_dropout": float(config.attention_dropout or 0.0),
            "windows": (None,) * layers,
            **switches,
        }
    )


def head_size(config: Any) -> int:
    """Returns the head size: the field head_dim or, without it, hidden size / heads."""
    if getattr(config, "head_dim", None) is not None:
        return config_size(config, "head_dim")
    return config_size(config, "hidden_size") // config_size(config, "num_attention_heads")


def layer_windows(config: Any) -> tuple[int | None, ...]:
    """Returns the window of each block, from the fields layer_types and sliding_window."""
    layers = config_size(config, "num_hidden_layers")
    kinds = config.layer_types
    if len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"layer_types is {kinds!r:.60}, expected full_attention or sliding_attention for each "
            f"of {layers} layers"
        )
    if "sliding_attention" not in kinds:
        return (None,) * layers
    window = config_size(config, "sliding_window")  # None without use_sliding_window
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# Fields by which configs of other families change the mathematics.
_OTHER_COMPUTATIONS = (
    "attention_bias",
    "attention_chunk_size",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "embedding_multiplier",
    "final_logit_softcapping",
    "layer_types",
    "logit_scale",
    "logits_scaling",
    "mlp_bias",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "qk_layernorm",
    "query_pre_attn_scalar",
    "residual_multiplier",
    "scale_depth",
    "scale_emb",
    "sliding_window",
    "use_bidirectional_attention",
    "use_qk_norm",
    "use_sliding_window",
)


def check_decoder(config: Any, decoder: Decoder, reads: Collection[str]) -> None:
    """Raises ValueError for a config that is invalid or that these modules do not support.

    `reads` are those of _OTHER_COMPUTATIONS that the family does read.
    """
    check_activation("hidden_act", decoder.activation)
    if decoder.heads % decoder.key_heads:
        raise ValueError(
            f"num_attention_heads is {decoder.heads}, not a multiple of num_key_value_heads "
            f"{decoder.key_heads}"
        )
    if decoder.head_size < 2 or decoder.head_size % 2:
        raise ValueError(f"the head size is {decoder.head_size}, expected an even number above 0")
    for name in _OTHER_COMPUTATIONS:
        if name not in reads and getattr(config, name, None):
            raise ValueError(f"{name} is {getattr(config, name)!r:.60}: not supported")


_BLOCK_KEYS = (
    "input_layernorm.weight",
    *(
        f"self_attn.{name}_proj.{kind}"
        for name in ("q", "k", "v", "o")
        for kind in ("weight", "bias")
    ),
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "post_attention_layernorm.weight",
    *(f"mlp.{name}_proj.{kind}" for name in ("gate", "up", "down") for kind in ("weight", "bias")),
)


def decoder_family(
    name: str,
    config_class: type[PreTrainedConfig],
    read: Callable[[Any], Decoder],
    *,
    reads: Collection[str] = (),
) -> Family:
    """Returns a family whose models are decoders.

    Args:
        name: the name in `modules.registry`.
        config_class: the config class of transformers.
        read: returns the decoder of a config.
        reads: the fields of the config that `read` uses, of those that other families lack.
    """
    return Family(
        name=name,
        config_class=config_class,
        make_embedding=lambda config: DecoderEmbedding(read(config)),
        make_block=lambda config, layer: DecoderBlock(read(config), layer),
        make_head=lambda config: DecoderHead(read(config)),
        sizes=lambda config: decoder_sizes(read(config)),
        hf_embedding={"embed_tokens.weight": "model.embed_tokens.weight"},
        hf_block={key: f"model.layers.{{layer}}.{key}" for key in _BLOCK_KEYS},
        hf_head={"norm.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"},
        buffers=re.compile(r"(^|\.)rotary_emb\.inv_freq$"),
        check_config=lambda config: check_decoder(config, read(config), reads),
    )
