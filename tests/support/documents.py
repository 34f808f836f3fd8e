"""Reference for packed documents: a Hugging Face model that computes one document at a time.

`doc_starts` (rows, seq_len) has, for each token, the index in its row at which its document starts.
"""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.layers.lm_head import IGNORED


def doc_starts_of(rows: Sequence[Sequence[int]]) -> Tensor:
    """Returns `doc_starts`; each element of `rows` has the lengths of the documents in one row."""
    return torch.tensor(
        [
            [sum(lengths[:number]) for number, length in enumerate(lengths) for _ in range(length)]
            for lengths in rows
        ]
    )


def doc_starts_after(token_ids: Tensor, end: int) -> Tensor:
    """Returns `doc_starts` (rows, seq_len); a document ends with the token `end`."""
    rows = []
    for row in token_ids.tolist():
        doc_starts = [0]
        for index, previous in enumerate(row[:-1]):
            doc_starts.append(index + 1 if previous == end else doc_starts[-1])
        rows.append(doc_starts)
    return torch.tensor(rows)


def documents_in(doc_starts: Tensor) -> Iterator[tuple[int, slice]]:
    """Yields the row of each document, and the document's slice of the row."""
    for row, starts in enumerate(doc_starts.tolist()):
        for start in sorted(set(starts)):
            yield row, slice(start, start + starts.count(start))


def losses_alone(model: Any, document: Tensor) -> Tensor:
    """Returns the losses of a document of shape (tokens,), for all tokens except the first."""
    logits = model(document.unsqueeze(0)).logits[0, :-1]
    return functional.cross_entropy(logits, document[1:], reduction="none")


class Alone(nn.Module):
    """A Hugging Face model that computes the losses of one document at a time.

    `find` returns `doc_starts` for rows of tokens. Labels have Hugging Face's format. The first
    token of a document is not predicted.
    """

    def __init__(self, model: Any, find: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._find = model, find

    def forward(self, tokens: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=self.token_losses(tokens, labels).mean())

    def token_losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the losses of all predicted tokens."""
        losses = [
            losses_alone(self.model, tokens[row, span])[labels[row, span][1:] != IGNORED]
            for row, span in documents_in(self._find(tokens))
        ]
        return torch.cat(losses)
