"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and models that differ only in their config.

Such models are TinyLlama, Vicuna, Code Llama, SmolLM2 and the Llama distillations of DeepSeek-R1.
With attention_bias, all four projections of attention have biases.
"""

from typing import Any

from transformers import LlamaConfig

from modules.families.decoder import Decoder
from modules.families.decoder_config import decoder_family, read_decoder


def read_llama(config: Any) -> Decoder:
    """Returns the decoder of a Llama config."""
    return read_decoder(
        config,
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        mlp_bias=bool(config.mlp_bias),
    )


FAMILY = decoder_family(
    "llama",
    LlamaConfig,
    read_llama,
    reads=("attention_bias", "mlp_bias"),
)
