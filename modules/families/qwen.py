"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115), and Qwen3's dense models (arXiv 2505.09388).

Qwen2 has biases on queries, keys and values. Qwen3 has norms on query and key heads instead, and
its head size is free. With use_sliding_window, the blocks from max_window_layers on have a window.
"""

from typing import Any

from transformers import Qwen2Config, Qwen3Config

from modules.families.decoder import Decoder
from modules.families.decoder_config import decoder_family, layer_windows, read_decoder

_WINDOW_FIELDS = ("layer_types", "sliding_window", "use_sliding_window")


def read_qwen2(config: Any) -> Decoder:
    """Returns the decoder of a Qwen2 config."""
    return read_decoder(config, windows=layer_windows(config), qkv_bias=True)


def read_qwen3(config: Any) -> Decoder:
    """Returns the decoder of a Qwen3 config."""
    return read_decoder(
        config,
        windows=layer_windows(config),
        qkv_bias=bool(config.attention_bias),
        output_bias=bool(config.attention_bias),
        head_norms=True,
    )


QWEN2 = decoder_family("qwen2", Qwen2Config, read_qwen2, reads=_WINDOW_FIELDS)
QWEN3 = decoder_family("qwen3", Qwen3Config, read_qwen3, reads=("attention_bias", *_WINDOW_FIELDS))
