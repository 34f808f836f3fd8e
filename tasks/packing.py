"""Documents become tokens, and tokens blocks: greedily, each source on its own.

A block is filled to the last token; what a document has left opens the next block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks.documents import Documents, State


@dataclass(frozen=True, eq=False)
class Block:
    """`tokens` is int64 (seq_length,); `trained[t]`, bool, says whether token t is to be predicted.

    The first token of a block is never predicted, whatever `trained` says. `documents` is where its
    text is from ("file:line"), in order; evaluation leaves it out.
    """

    tokens: NDArray[np.int64]
    trained: NDArray[np.bool_]
    documents: tuple[str, ...] = ()


class Encoder:
    """A document's tokens: its own and the end-of-text token, or a separator's text before it.

    No special tokens are added otherwise. With a separator nothing is appended, and separator and
    text are tokenized together (predecessors did so with a newline).
    """

    def __init__(self, tokenizer: Any, separator: str | None = None) -> None:
        if separator is None and tokenizer.eos_token_id is None:
            raise ValueError(
                "--tokenizer-name: the tokenizer has no eos_token to end documents with: expected"
                " one, or a --doc-separator"
            )
        self.separator = separator
        self._tokenizer = tokenizer
        self._end = [tokenizer.eos_token_id] if separator is None else []

    def encode(self, text: str) -> NDArray[np.int64]:
        """The tokens of one document, (tokens,); may be none where a separator is given."""
        # verbose=False: a document may well be longer than the model's context, no warning.
        encoded = self._tokenizer(
            (self.separator or "") + text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return np.array(encoded["input_ids"] + self._end, dtype=np.int64)


class PackedSource:
    """The blocks of one source, without end.

    The state is the documents' before the one that is part-used, and how much of that is used.
    """

    def __init__(self, documents: Documents, encoder: Encoder, seq_length: int) -> None:
        self._documents = documents
        self._encoder = encoder
        self._seq_length = seq_length
        self._before = documents.state()
        self._tokens = np.empty(0, dtype=np.int64)
        self._where = ""
        self._used = 0
        self._last_fruitful_epoch = -1
        self._num_documents = 0
        self._num_blocks = 0

    def next_block(self) -> Block:
        """The next block, all of it trained.

        Raises:
            ValueError: A line is no document, or a whole epoch yields no token.
        """
        tokens = np.empty(self._seq_length, dtype=np.int64)
        documents: list[str] = []
        filled = 0
        while filled < self._seq_length:
            if self._used == len(self._tokens):
                self._next_document()
            if not documents or documents[-1] != self._where:
                documents.append(self._where)
            piece = self._tokens[self._used : self._used + self._seq_length - filled]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._used += len(piece)
        self._num_blocks += 1
        return Block(tokens, np.ones(self._seq_length, dtype=np.bool_), tuple(documents))

    def _next_document(self) -> None:
        self._before = self._documents.state()
        document = self._documents.next()
        self._tokens, self._used = self._encoder.encode(document.text), 0
        self._where = document.where
        self._num_documents += 1
        if len(self._tokens):
            self._last_fruitful_epoch = self._documents.epoch
        elif self._documents.epoch > self._last_fruitful_epoch + 1:
            raise self._documents.source.empty_error("yields no token")

    def state(self) -> State:
        """What `restore` needs to go on with the next block."""
        return {
            "documents": self._before,
            "used": self._used,
            "num_documents": self._num_documents,
            "num_blocks": self._num_blocks,
            "epoch": self._documents.epoch,
        }

    def restore(self, state: State) -> None:
        """Goes to where `state` was taken, reading one chunk and tokenizing one document.

        Raises:
            ValueError: The source is not the one that the state was taken from.
        """
        self._documents.restore(state["documents"])
        self._last_fruitful_epoch = self._documents.epoch
        self._tokens, self._used = np.empty(0, dtype=np.int64), 0
        if state["used"]:
            self._next_document()
        self._num_documents, self._num_blocks = state["num_documents"], state["num_blocks"]
        self._used = state["used"]
        if self._used > len(self._tokens):
            raise self._documents.source.empty_error("changed since the checkpoint")


def pack_once(texts: Iterable[str], encoder: Encoder, seq_length: int) -> Iterator[Block]:
    """Packs in order, once. What the last block lacks is token 0 and not trained."""
    tokens = np.zeros(seq_length, dtype=np.int64)
    filled = 0
    for text in texts:
        rest = encoder.encode(text)
        while len(rest):
            piece, rest = rest[: seq_length - filled], rest[seq_length - filled :]
            tokens[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == seq_length:
                yield Block(tokens, np.ones(seq_length, dtype=np.bool_))
                tokens, filled = np.zeros(seq_length, dtype=np.int64), 0
    if filled > 1:  # a block of one token predicts nothing
        yield Block(tokens, np.arange(seq_length) < filled)
