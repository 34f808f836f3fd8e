"""The workload of both sides, ours and torch's, in `pipeline.py`: model, batch and optimizer."""

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
    """A GPT-NeoX, and batches of `batch` sequences; a microbatch has one sequence.

    `split`: layers per stage. `precision`: fp32 or bf16; with bf16, the masters remain fp32.
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
        """Builds the Hugging Face model from which both sides take the same weights."""
        torch.manual_seed(SEED)
        return GPTNeoXForCausalLM(self.config)

    def rows(self, replica: int = 0) -> Tensor:
        """Returns a replica's token ids, shape (batch, tokens); every step trains on them."""
        generator = torch.Generator().manual_seed(SEED + replica)
        shape = (self.batch, self.tokens)
        return torch.randint(0, self.vocabulary, shape, generator=generator)

    def on(self, **changes: Any) -> "Workload":
        """Returns a copy of the workload with changed fields."""
        return replace(self, **changes)


class Contender(Protocol):
    """One side of a benchmark, in one process."""

    def step(self) -> float:
        """Makes one update; returns the loss before it, or NaN if this process computes no loss."""
