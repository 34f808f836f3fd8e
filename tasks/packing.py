"""Documents become tokens, and tokens blocks: greedily, each source on its own.

A block is filled to the last token; what a document has left opens the next block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tasks.bad_lines import BadLines
from tasks.chat import ChatFormat, Spans, bot_turns
from tasks.documents import State
from tasks.source import BadLineError, Document, Source

TrainOn = Literal["all", "completion"]


@dataclass(frozen=True, eq=False)
class Block:
    """`tokens` is int64 (seq_length,); `trained[t]`, bool, says whether token t is to be predicted.

    The first token of a block is never predicted, whatever `trained` says. `documents` is where its
    text is from ("file:line"), in order; evaluation leaves it out.

    begins: int64 (seq_length,), the place in the block of the first token of token t's document,
    where documents are kept apart: that first token is not predicted either. None: they are not.
    """

    tokens: NDArray[np.int64]
    trained: NDArray[np.bool_]
    documents: tuple[str, ...] = ()
    begins: NDArray[np.int64] | None = None

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """bool (seq_length,): which tokens are trained and follow one of their document."""
        places = np.arange(len(self.tokens))
        return self.trained & (places > (0 if self.begins is None else self.begins))


class Encoded(NamedTuple):
    """A document's `tokens`, int64 (n,), and which of them are `trained`, bool (n,)."""

    tokens: NDArray[np.int64]
    trained: NDArray[np.bool_]


NOTHING = Encoded(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.bool_))


class Encoder:
    """A document's tokens: its own and the end-of-text token, or a separator's text before it.

    No special tokens are added otherwise. With a separator nothing is appended, and separator and
    text are tokenized together (predecessors did so with a newline).

    train_on: "all", or "completion": the answers alone, and the end of text after one. A text is
    tokenized as a whole either way; a token is trained if any of its characters is an answer's.
    """

    def __init__(
        self, tokenizer: Any, separator: str | None = None, train_on: TrainOn = "all"
    ) -> None:
        if separator is None and tokenizer.eos_token_id is None:
            raise ValueError(
                "--tokenizer-name: the tokenizer has no eos_token to end documents with: expected"
                " one, or a --doc-separator"
            )
        if train_on == "completion" and not tokenizer.is_fast:
            raise ValueError(
                "--train-on completion: expected a tokenizer that tells which characters a token "
                "is made of (a fast one of transformers)"
            )
        self.separator, self.train_on = separator, train_on
        self._tokenizer, self._chat = tokenizer, ChatFormat(tokenizer)
        self._end = [tokenizer.eos_token_id] if separator is None else []

    def encode(self, document: Document) -> Encoded:
        """The tokens of one document; may be none where a separator is given.

        Raises:
            BadLineError: It is a conversation that cannot be made a text.
        """
        text = document.text if document.messages is None else self._chat.text(document)
        before = self.separator or ""
        spans = self._answers(document, text) if self.train_on == "completion" else None
        # verbose=False: a document may well be longer than the model's context, no warning.
        encoded = self._tokenizer(
            before + text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=spans is not None,
            verbose=False,
        )
        tokens = np.array(encoded["input_ids"] + self._end, dtype=np.int64)
        trained = np.ones(len(tokens), dtype=np.bool_)
        if spans is not None:
            offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
            trained[: len(offsets)] = _touch(offsets - len(before), spans)
            trained[len(offsets) :] = bool(spans) and spans[-1][1] == len(text)
        return Encoded(tokens, trained)

    def _answers(self, document: Document, text: str) -> Spans | None:
        if document.messages is not None:
            return self._chat.completions(document, text)
        return bot_turns(text) if document.completions is None else document.completions


def _touch(tokens: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Which of `tokens` (n, 2), each from a character to before another, share one with a span."""
    trained = np.zeros(len(tokens), dtype=np.bool_)
    for start, end in spans:
        trained |= np.maximum(tokens[:, 0], start) < np.minimum(tokens[:, 1], end)
    return trained


class Shuffled(Protocol):
    """The documents of a source, without end: `tasks.documents`, `tasks.indexed_documents`."""

    source: Source
    epoch: int
    bad_lines: BadLines

    @property
    def num_lines(self) -> int | None:
        """How many lines there are, blank ones included; None where nothing tells but reading."""

    def next(self) -> Document: ...

    def state(self) -> State: ...

    def restore(self, state: State) -> None: ...


class PackedSource:
    """The blocks of one source, without end.

    The state is the documents' before the one that is part-used, and how much of that is used.
    """

    def __init__(self, documents: Shuffled, encoder: Encoder, seq_length: int) -> None:
        self._documents = documents
        self._encoder = encoder
        self._seq_length = seq_length
        self._before = documents.state()
        self._encoded = NOTHING
        self._where = ""
        self._used = 0
        self._last_fruitful_epoch = -1
        self._num_documents = 0
        self._num_blocks = 0

    def next_block(self) -> Block:
        """The next block that trains any token; those that train none are passed over.

        Raises:
            ValueError: A line is no document, or a whole epoch yields no token to train.
        """
        passed_over_in: int | None = None
        while not (block := self._pack()).predicted.any():
            epoch = self._documents.epoch
            passed_over_in = epoch if passed_over_in is None else passed_over_in
            if epoch > passed_over_in + 1:
                raise self._documents.source.empty_error(
                    f"yields no token to train (--train-on {self._encoder.train_on})"
                )
        self._num_blocks += 1
        return block

    def _pack(self) -> Block:
        tokens = np.empty(self._seq_length, dtype=np.int64)
        trained = np.empty(self._seq_length, dtype=np.bool_)
        documents: list[str] = []
        filled = 0
        while filled < self._seq_length:
            if self._used == len(self._encoded.tokens):
                self._next_document()
            if not documents or documents[-1] != self._where:
                documents.append(self._where)
            end = min(len(self._encoded.tokens), self._used + self._seq_length - filled)
            here = slice(filled, filled + end - self._used)
            tokens[here], trained[here] = (part[self._used : end] for part in self._encoded)
            filled, self._used = here.stop, end
        return Block(tokens, trained, tuple(documents))

    def _next_document(self) -> None:
        self._before = self._documents.state()
        document = self._documents.next()
        self._encoded, self._used = self._encode(document), 0
        self._where = document.where
        self._num_documents += 1
        if len(self._encoded.tokens):
            self._last_fruitful_epoch = self._documents.epoch
        elif self._documents.epoch > self._last_fruitful_epoch + 1:
            raise self._documents.source.empty_error("yields no token")

    def _encode(self, document: Document) -> Encoded:
        try:
            return self._encoder.encode(document)
        except BadLineError as error:
            self._documents.bad_lines.take(error)
            return NOTHING

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
        self._encoded, self._used = NOTHING, 0
        if state["used"]:
            self._next_document()
        self._num_documents, self._num_blocks = state["num_documents"], state["num_blocks"]
        self._used = state["used"]
        if self._used > len(self._encoded.tokens):
            raise self._documents.source.empty_error("changed since the checkpoint")


def pack_once(encoded: Iterable[Encoded], seq_length: int) -> Iterator[Block]:
    """Packs documents in order, once. What the last block lacks is token 0 and not trained.

    Blocks that train no token are left out.
    """
    for block in _pack_all(encoded, seq_length):
        if block.predicted.any():
            yield block


def _pack_all(documents: Iterable[Encoded], seq_length: int) -> Iterator[Block]:
    block, filled = _empty_block(seq_length), 0
    for encoded in documents:
        used = 0
        while used < len(encoded.tokens):
            end = min(len(encoded.tokens), used + seq_length - filled)
            here = slice(filled, filled + end - used)
            block.tokens[here], block.trained[here] = (part[used:end] for part in encoded)
            used = end
            filled = here.stop
            if filled == seq_length:
                yield block
                block, filled = _empty_block(seq_length), 0
    yield block


def _empty_block(seq_length: int) -> Block:
    return Block(np.zeros(seq_length, dtype=np.int64), np.zeros(seq_length, dtype=np.bool_))
