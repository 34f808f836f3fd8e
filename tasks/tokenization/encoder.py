"""Documents become tokens, and which of them are trained."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasks.sources.base import BadLineError, Document
from tasks.tokenization.chat import ChatFormat, Spans, bot_turns

TrainOn = Literal["all", "completion"]


class Encoded(NamedTuple):
    """A document's `tokens`, int32 (n,), and which of them are `trained`, bool (n,)."""

    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]


_BEFORE_ALL = np.iinfo(np.int64).min
NOTHING = Encoded(np.empty(0, dtype=np.int32), np.empty(0, dtype=np.bool_))


class _Text(NamedTuple):
    """What of a document is tokenized; `answers` are the characters to train on, None: all.

    ends: whether it has an end of text of its own, which a chat template wrote.
    """

    text: str
    answers: Spans | None
    ends: bool


class _Tokens(NamedTuple):
    """A text's tokens, the end of text with them, and from which character to before which each of
    the text's own is; None: not asked for."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64] | None


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
        end = [] if separator is not None else [tokenizer.eos_token_id]
        self._tokenize = _Fast(tokenizer, end) if tokenizer.is_fast else _Slow(tokenizer, end)
        self._chat = ChatFormat(tokenizer)

    def encode(self, document: Document) -> Encoded:
        """The tokens of one document; may be none where a separator is given.

        Raises:
            BadLineError: It is a conversation that cannot be made a text.
        """
        (encoded,) = self.encode_all([document])
        if isinstance(encoded, BadLineError):
            raise encoded
        return encoded

    def encode_all(self, documents: Sequence[Document]) -> list[Encoded | BadLineError]:
        """The tokens of several, or what is wrong with them (see `encode`)."""
        texts = [self._text(document) for document in documents]
        good = [text for text in texts if isinstance(text, _Text)]
        before = self.separator or ""
        found = iter(
            self._tokenize([before + text.text for text in good], self.train_on == "completion")
        )
        return [
            self._finish(next(found), text) if isinstance(text, _Text) else text for text in texts
        ]

    def _text(self, document: Document) -> _Text | BadLineError:
        try:
            text = document.text if document.messages is None else self._chat.text(document)
            whole = self.train_on == "all"
            answers = None if whole else self._answers(document, text)
            ends = document.messages is not None and self._chat.ends(text)
            return _Text(text, answers, ends)
        except BadLineError as error:
            return error

    def _answers(self, document: Document, text: str) -> Spans | None:
        if document.messages is not None:
            return self._chat.completions(document, text)
        return bot_turns(text) if document.completions is None else document.completions

    def _finish(self, found: _Tokens, text: _Text) -> Encoded:
        trained = np.ones(len(found.ids), dtype=np.bool_)
        if text.answers is not None:
            assert found.offsets is not None
            own = len(found.offsets)
            trained[:own] = _touch(found.offsets - len(self.separator or ""), text.answers)
            trained[own:] = bool(text.answers) and text.answers[-1][1] == len(text.text)
        if text.ends and self.separator is None:
            return Encoded(found.ids[:-1], trained[:-1])
        return Encoded(found.ids, trained)


def _touch(tokens: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Which of `tokens` (n, 2), each from a character to before another, share one with a span.

    Spans are in order and do not overlap; a conversation may have very many.
    """
    held = np.array([span for span in spans if span[0] < span[1]], dtype=np.int64).reshape(-1, 2)
    begun = np.searchsorted(held[:, 0], tokens[:, 1])  # spans that begin before a token's end
    end_of_last = np.concatenate(([_BEFORE_ALL], held[:, 1]))[begun]
    touches: NDArray[np.bool_] = end_of_last > tokens[:, 0]
    return touches & (tokens[:, 0] < tokens[:, 1])


class _Fast:
    """The tokenizers library without what transformers builds around each text.

    It can be pickled to a process that has no need to import transformers. The tokenizer's last
    step is left out: it adds special tokens, which are not wanted, and takes white space out of
    the characters that a token is said to be made of (GPT-NeoX's does), so that spaces in an answer
    would be no one's.
    """

    def __init__(self, tokenizer: Any, end: list[int]) -> None:
        split = bool(getattr(tokenizer, "split_special_tokens", False))
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = split
        backend.post_processor = None
        self._backend, self._end = backend, end

    def __call__(self, texts: Sequence[str], wants_offsets: bool) -> list[_Tokens]:
        """The tokens of each text; long ones go through in pieces, so that memory is bounded."""
        if are_short(texts):
            return self._encode(texts, wants_offsets, self._end)
        pieces = [cut(text) for text in texts]
        flat = itertools.chain.from_iterable(pieces)
        encoded = itertools.chain.from_iterable(
            self._encode(batch, wants_offsets, []) for batch in in_batches(flat)
        )
        return [_joined(of_text, encoded, self._end) for of_text in pieces]

    def _encode(self, texts: Sequence[str], wants_offsets: bool, end: list[int]) -> list[_Tokens]:
        """The tokens of each text, and `end`."""
        if not wants_offsets:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
            return [_Tokens(np.array(one.ids + end, dtype=np.int32), None) for one in found]
        found = self._backend.encode_batch(texts, add_special_tokens=False)
        return [
            _Tokens(
                np.array(one.ids + end, dtype=np.int32),
                np.array(one.offsets, dtype=np.int64).reshape(-1, 2),
            )
            for one in found
        ]


def _joined(pieces: Sequence[str], encoded: Iterator[_Tokens], end: list[int]) -> _Tokens:
    """The tokens of a text, which are those of its `pieces`, the next of `encoded`, and `end`."""
    found = list(itertools.islice(encoded, len(pieces)))
    ids = np.concatenate([*(one.ids for one in found), np.array(end, dtype=np.int32)])
    starts = itertools.accumulate(map(len, pieces[:-1]), initial=0)
    pairs = zip(found, starts, strict=True)
    shifted = [one.offsets + start for one, start in pairs if one.offsets is not None]
    return _Tokens(ids, np.concatenate(shifted) if shifted else None)


class _Slow:
    """A tokenizer that is written in Python, which tells no characters."""

    def __init__(self, tokenizer: Any, end: list[int]) -> None:
        self._tokenizer, self._end = tokenizer, end

    def __call__(self, texts: Sequence[str], _wants_offsets: bool) -> list[_Tokens]:
        return [
            _Tokens(np.array(self._ids(text) + self._end, dtype=np.int32), None) for text in texts
        ]

    def _ids(self, text: str) -> list[int]:
        # verbose=False: a document may well be longer than the model's context, no warning.
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])


PIECE = 1 << 20  # characters


BATCH = 1 << 22  # characters that are tokenized at once


_GAP = re.compile(r"(?<=\S) (?=[^\W\d_])")  # one space between a word and a letter


_SEARCH = 1 << 14


def are_short(texts: Sequence[str]) -> bool:
    """Whether all of them together are no more than a piece."""
    return sum(map(len, texts)) <= PIECE


def cut(text: str) -> list[str]:
    """`text` in pieces of up to PIECE characters, each but the first from a space on.

    Byte-level tokenizers, which are those of GPT-J and GPT-NeoX, never join what is on both sides
    of such a space: the tokens are those of the whole. Where none is near, the cut is anywhere.
    """
    pieces, start = [], 0
    while len(text) - start > PIECE:
        limit = start + PIECE
        gaps = list(_GAP.finditer(text, limit - _SEARCH, limit))
        end = gaps[-1].start() if gaps else limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def in_batches(pieces: Iterable[str]) -> Iterator[list[str]]:
    """Lists of pieces of BATCH characters in all, or a piece more."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
