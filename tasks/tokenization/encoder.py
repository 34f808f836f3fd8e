"""The encoder of documents: makes token ids and a mask of the tokens to train on."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.sources.base import BadLineError, Document
from tasks.tokenization.batch_tokenizer import FastTokenizer, SlowTokenizer, TokenizedText
from tasks.tokenization.chat import ChatFormat, Spans, find_bot_turns

TrainOn = Literal["all", "completion"]


class EncodedDocument(NamedTuple):
    """A document's `token_ids`, int32 (n,), and a mask of its `trained` tokens, bool (n,)."""

    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]


Results = list[EncodedDocument | BadLineError]
EMPTY = EncodedDocument(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_))
_BEFORE_ALL = np.iinfo(np.int64).min


class _EncoderInput(NamedTuple):
    """The text of a document.

    answers: the spans of characters to train on; None: the complete text.
    has_end: whether a chat template already added the end-of-text token.
    """

    text: str
    answers: Spans | None
    has_end: bool


class Encoder:
    """An encoder of documents, which adds the end-of-text token after each document.

    If there is a separator, the encoder adds no end-of-text token. It puts the separator before the
    text and tokenizes both together. The encoder adds no other special tokens.

    train_on: "all" trains on all tokens. "completion" trains only on tokens with at least one
        character in an answer, and on the end-of-text token after an answer. The value does not
        change the tokens.
    """

    def __init__(
        self, tokenizer: Any, separator: str | None = None, train_on: TrainOn = "all"
    ) -> None:
        if separator is None and tokenizer.eos_token_id is None:
            raise ValueError(
                "--tokenizer-name: the tokenizer has no eos_token to end documents with: use"
                " another tokenizer, or --doc-separator"
            )
        if train_on == "completion" and not tokenizer.is_fast:
            raise ValueError(
                "--train-on completion: expected a tokenizer that reports the characters of each "
                "token (a fast tokenizer of transformers)"
            )
        self.separator, self.train_on = separator, train_on
        end_ids = [] if separator is not None else [tokenizer.eos_token_id]
        kind: type[FastTokenizer | SlowTokenizer]
        kind = FastTokenizer if tokenizer.is_fast else SlowTokenizer
        self._tokenize = kind(tokenizer, end_ids)
        self._chat = ChatFormat(tokenizer)

    def encode(self, document: Document) -> EncodedDocument:
        """Encodes one document; raises BadLineError if its messages cannot be rendered."""
        (encoded,) = self.encode_all([document])
        if isinstance(encoded, BadLineError):
            raise encoded
        return encoded

    def encode_all(self, documents: Sequence[Document | BadLineError]) -> Results:
        """Encodes several documents; the result of a bad document is its error (see `encode`)."""
        inputs = [self._prepare(document) for document in documents]
        separator = self.separator or ""
        texts = [separator + item.text for item in inputs if isinstance(item, _EncoderInput)]
        tokenized = iter(self._tokenize(texts, self.train_on == "completion"))
        return [
            self._mask(next(tokenized), item) if isinstance(item, _EncoderInput) else item
            for item in inputs
        ]

    def _prepare(self, document: Document | BadLineError) -> _EncoderInput | BadLineError:
        if isinstance(document, BadLineError):
            return document
        try:
            is_chat = document.messages is not None
            text = self._chat.render(document) if is_chat else document.text
            answers = None if self.train_on == "all" else self._find_answers(document, text)
            return _EncoderInput(text, answers, is_chat and self._chat.has_end(text))
        except BadLineError as error:
            return error

    def _find_answers(self, document: Document, text: str) -> Spans | None:
        if document.messages is not None:
            return self._chat.find_completions(document, text)
        return find_bot_turns(text) if document.completions is None else document.completions

    def _mask(self, tokenized: TokenizedText, item: _EncoderInput) -> EncodedDocument:
        token_ids, offsets = tokenized
        trained = np.ones(len(token_ids), dtype=np.bool_)
        if item.answers is not None:
            assert offsets is not None
            length = len(offsets)  # without the end-of-text token
            trained[:length] = overlap(offsets - len(self.separator or ""), item.answers)
            trained[length:] = bool(item.answers) and item.answers[-1][1] == len(item.text)
        if item.has_end and self.separator is None:
            return EncodedDocument(token_ids[:-1], trained[:-1])
        return EncodedDocument(token_ids, trained)


def overlap(offsets: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Returns a mask, bool (n,), of the tokens with at least one character inside a span.

    offsets: int64 (n, 2), the first and last (exclusive) character of each token.
    spans: sorted, without overlaps. They are searched by bisection, because a conversation may have
        very many spans.
    """
    filled = np.array([span for span in spans if span[0] < span[1]], dtype=np.int64).reshape(-1, 2)
    num_begun = np.searchsorted(filled[:, 0], offsets[:, 1])  # spans that begin before a token ends
    last_end = np.concatenate(([_BEFORE_ALL], filled[:, 1]))[num_begun]
    is_overlapping: NDArray[np.bool_] = last_end > offsets[:, 0]
    return is_overlapping & (offsets[:, 0] < offsets[:, 1])
