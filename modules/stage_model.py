"""The modules of one stage in a row: any consecutive part of embedding, blocks and head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.dropout import Keys
from modules.family import Family
from modules.layers import make_layer


def stage_modules(stage: int, *, num_stages: int, num_layers: int, model_layers: int) -> range:
    """Which of the model's modules (0 the embedding, 1..L the blocks, L + 1 the head) a stage has.

    Stage i holds blocks [i * num_layers, min((i + 1) * num_layers, L)), the first stage the
    embedding too, the last the head.
    """
    start = stage * num_layers
    stop = min(start + num_layers, model_layers)
    first = 0 if stage == 0 else start + 1
    last = model_layers + 1 if stage == num_stages - 1 else stop
    return range(first, last + 1)


class StageModel(nn.ModuleList):
    """Modules `indices` of a model, in fp32, uninitialised; its keys are `<j>.<name>`, j from 0."""

    def __init__(
        self, family: Family, config: Any, indices: range, *, device: torch.device | str
    ) -> None:
        super().__init__(make_layer(family, config, index, device) for index in indices)
        self.indices = indices
        self.has_embedding = indices.start == 0
        self.has_head = indices.stop == config.num_hidden_layers + 2

    def forward(self, x: Tensor, keys: Keys, *, recompute: bool = False) -> Tensor:
        """Activations (rows, tokens, hidden) or, on the first stage, token ids (rows, tokens) to
        activations or, on the last stage, logits of all but the last position.

        `recompute` keeps a block's input alone and computes the rest again in backward.
        """
        for index, module in zip(self.indices, self, strict=True):
            is_end = (self.has_embedding and index == 0) or (
                self.has_head and index == self.indices.stop - 1
            )
            if is_end and index > 0:
                x = x[:, :-1]
            run = cast(Callable[..., Tensor], module)
            if recompute and not is_end and torch.is_grad_enabled():
                x = checkpoint(run, x, keys, use_reentrant=False, preserve_rng_state=False)
            else:
                x = run(x, keys)
        return x
