"""The workload of both sides of a comparison: model, batch and optimizer.

`pipeline.py` compares this project with torch; check 7 of tests/gpu with a loop over Hugging Face's
model.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from modules.layers.selective import Recompute

LR, EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, 1e-6, 0.01, 1.0
SEED = 7
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # bf16: the two sides round at different places
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workload:
    """A GPT-NeoX or GPT-J, and batches of `batch` sequences of `tokens` tokens.

    `split`: layers per stage. `precision`: fp32 or bf16; with bf16, the masters remain fp32.
    """

    split: tuple[int, ...] = (4, 4)
    batch: int = 8
    precision: str = "fp32"
    recompute: Recompute = "none"
    hidden: int = 512
    heads: int = 8
    inner: int = 2048
    vocabulary: int = 8192
    tokens: int = 256
    micro_batch: int = 1
    family: str = "gptneox"

    @property
    def layers(self) -> int:
        return sum(self.split)

    @cached_property
    def config(self) -> Any:
        if self.family == "gptj":
            return GPTJConfig(
                n_embd=self.hidden,
                n_layer=self.layers,
                n_head=self.heads,
                n_inner=self.inner,
                vocab_size=self.vocabulary,
                n_positions=self.tokens,
                rotary_dim=self.hidden // self.heads // 4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="sdpa",
            )
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

    @property
    def num_microbatches(self) -> int:
        return self.batch // self.micro_batch

    def model(self, device: torch.device = CPU) -> Any:
        """Builds the Hugging Face model from which both sides take the same weights."""
        torch.manual_seed(SEED)
        kind: Any = GPTJForCausalLM if self.family == "gptj" else GPTNeoXForCausalLM
        with device:
            return kind(self.config)

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
