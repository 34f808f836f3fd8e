"""The work that both sides of `pipeline.py` do: one model, one batch of tokens, one optimizer."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

LR, EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, 1e-6, 0.01, 1.0
SEED = 7


@dataclass(frozen=True)
class Workload:
    """A GPT-NeoX and batches of `batch` sequences, a microbatch being one of them.

    `split`: layers of each stage. `precision`: fp32 or bf16 (compute copies of fp32 masters).
    """

    split: tuple[int, ...] = (4, 4)
    batch: int = 8
    precision: str = "fp32"
    recompute: bool = False
    hidden: int = 512
    heads: int = 8
    inner: int = 2048
    vocabulary: int = 8192
    tokens: int = 256

    @property
    def layers(self) -> int:
        return sum(self.split)

    @cached_property
    def config(self) -> Any:
        return GPTNeoXConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.inner,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.tokens,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            attn_implementation="sdpa",
        )

    def model(self) -> Any:
        """The Hugging Face model that both sides take their weights from; the same each time."""
        torch.manual_seed(SEED)
        return GPTNeoXForCausalLM(self.config)

    def rows(self, replica: int = 0) -> Tensor:
        """Token ids (batch, tokens) of a replica; every step trains on the same."""
        generator = torch.Generator().manual_seed(SEED + replica)
        shape = (self.batch, self.tokens)
        return torch.randint(0, self.vocabulary, shape, generator=generator)

    def on(self, **changes: Any) -> "Workload":
        """The same with some other fields."""
        return replace(self, **changes)


class Contender(Protocol):
    """One side, in one process."""

    def step(self) -> float:
        """One update; the loss before it, where this process knows it (else NaN)."""
