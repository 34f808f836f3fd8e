"""Mistral 7B (Jiang et al., arXiv 2310.06825), Mistral Nemo, and models with the same config class.

In Mistral 7B v0.1 a query sees the last 4096 keys; later models have no window. In Nemo the head
size is not hidden size / heads.
"""

from typing import Any

from transformers import MistralConfig

from modules.families.base import config_size
from modules.families.decoder import Decoder
from modules.families.decoder_config import decoder_family, read_decoder


def read_mistral(config: Any) -> Decoder:
    """Returns the decoder of a Mistral config; all blocks have the same window.

    Raises ValueError if sliding_window is neither None nor an integer above 0.
    """
    layers = config_size(config, "num_hidden_layers")
    window = None if config.sliding_window is None else config_size(config, "sliding_window")
    return read_decoder(config, windows=(window,) * layers)


FAMILY = decoder_family(
    "mistral",
    MistralConfig,
    read_mistral,
    reads=("sliding_window",),
)
