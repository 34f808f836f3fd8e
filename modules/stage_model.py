"""The model of one stage: consecutive modules of the complete model (embedding, blocks, head)."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.attention.packed_documents import PackedDocuments
from modules.build import make_layer
from modules.families.base import Family
from modules.layers.dropout import Keys
from modules.layers.lm_head import Head
from modules.layers.selective import Recompute, recompute_selectively


class StageModel(nn.ModuleList):
    """A stage's modules, in fp32, uninitialised; `indices` are their numbers in the complete model.

    A key of its state dict is `<j>.<name>`; j counts the stage's modules from 0.
    """

    def __init__(
        self, family: Family, config: Any, indices: range, *, device: torch.device | str
    ) -> None:
        super().__init__(make_layer(family, config, index, device) for index in indices)
        self.indices = indices
        self.has_embedding = indices.start == 0
        self.has_head = indices.stop == config.num_hidden_layers + 2

    def forward(
        self,
        x: Tensor,
        keys: Keys,
        *,
        documents: PackedDocuments | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Returns activations or, on the last stage, logits of all positions except the last.

        Args:
            x: activations (rows, seq_len, hidden); on the first stage token ids (rows, seq_len).
            keys: the dropout key of each row; None for no dropout.
            documents: the documents of packed rows, which do not attend to each other; None if
                attention covers complete rows.
            recompute: which activations backward computes again: none, those that are cheap, or
                all of each block but its input.
        """
        x = self._up_to_head(x, keys, documents, recompute=recompute)
        return self.head(x[:, :-1], keys, documents) if self.has_head else x

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        keys: Keys,
        *,
        scale: float,
        documents: PackedDocuments | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Returns the sum of the token losses; only the last stage calls this.

        Backward multiplies the gradients by `scale` (see `modules.layers.lm_head`). `labels` are
        (rows, seq_len): the next token of each position, or IGNORED. The last position has no next
        token and is not used.
        """
        x = self._up_to_head(x, keys, documents, recompute=recompute)
        return self.head.loss(x[:, :-1], labels[:, :-1], scale=scale)

    @property
    def head(self) -> Head:
        head = self[-1]
        assert isinstance(head, Head)
        return head

    def _up_to_head(
        self, x: Tensor, keys: Keys, documents: PackedDocuments | None, *, recompute: Recompute
    ) -> Tensor:
        for index, module in zip(self.indices, self, strict=True):
            if self.has_head and index == self.indices.stop - 1:
                break
            mode: Recompute = recompute if index > 0 else "none"
            x = self.run_module(module, x, keys, documents, recompute=mode)
        return x

    def run_module(
        self,
        module: nn.Module,
        x: Tensor,
        keys: Keys,
        documents: PackedDocuments | None,
        *,
        recompute: Recompute,
    ) -> Tensor:
        """Returns the output of one of the modules; the arguments are as in `forward`."""
        run = cast(Callable[..., Tensor], module)
        if recompute == "full" and torch.is_grad_enabled():
            out: Tensor = checkpoint(
                run, x, keys, documents, use_reentrant=False, preserve_rng_state=False
            )
            return out
        if recompute == "selective" and torch.is_grad_enabled():
            with recompute_selectively(module):
                return run(x, keys, documents)
        return run(x, keys, documents)
