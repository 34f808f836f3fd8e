"""Documents by themselves in the Hugging Face model: what keeping them apart is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

IGNORED = -100


def begins_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """Of rows that are full of documents of these lengths."""
    return torch.tensor(
        [
            [sum(lengths[:number]) for number, length in enumerate(lengths) for _ in range(length)]
            for lengths in rows
        ]
    )


def begins_after(tokens: Tensor, end: int) -> Tensor:
    """Where in its row each token's document begins, if `end` is each document's last token."""
    rows = []
    for row in tokens.tolist():
        begins = [0]
        for place, before in enumerate(row[:-1]):
            begins.append(place + 1 if before == end else begins[-1])
        rows.append(begins)
    return torch.tensor(rows)


def documents_in(begins: Tensor) -> Iterator[tuple[int, slice]]:
    """Each document's row and place there."""
    for row, places in enumerate(begins.tolist()):
        for start in sorted(set(places)):
            yield row, slice(start, start + places.count(start))


def losses_alone(model: Any, document: Tensor) -> Tensor:
    """The losses of a document's tokens but the first; `document` is (tokens,), run by itself."""
    logits = model(document.unsqueeze(0)).logits[0, :-1]
    return functional.cross_entropy(logits, document[1:], reduction="none")


class Alone(nn.Module):
    """A Hugging Face model whose loss is that of each document by itself.

    `find` tells where documents begin in rows of tokens; labels are as Hugging Face has them, and a
    document's first token is not predicted.
    """

    def __init__(self, model: Any, find: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._find = model, find

    def forward(self, tokens: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.token_losses(tokens, labels).mean())

    def token_losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Of all that are predicted."""
        losses = [
            losses_alone(self.model, tokens[row, here])[labels[row, here][1:] != IGNORED]
            for row, here in documents_in(self._find(tokens))
        ]
        return torch.cat(losses)
