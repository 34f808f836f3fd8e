"""Tokenization of many texts at once: the same ids as with transformers, in bounded memory."""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK_CHARACTERS = 1 << 20  # the longest text that is tokenized at once
BATCH_CHARACTERS = 1 << 22  # the length of all texts that are tokenized at once
SEARCH_CHARACTERS = 1 << 14  # the length of the end of a chunk where a gap is searched
_GAP = re.compile(r"(?<=\S) (?=[^\W\d_])")  # one space between a word and a letter


class TokenizedText(NamedTuple):
    """The tokens of a text, followed by the end-of-text token if it is used.

    token_ids: int32 (n,).
    offsets: int64 (m, 2), the first and last (exclusive) character of each token of the text,
        without the end-of-text token; None if offsets were not requested.
    """

    token_ids: NDArray[np.int32]
    offsets: NDArray[np.int64] | None


class FastTokenizer:
    """A fast tokenizer; it calls the tokenizers library directly, without transformers' overhead.

    A process that unpickles this object does not import transformers. The tokenizer's
    post-processor is not used, because it adds special tokens. GPT-NeoX's post-processor also
    removes white space from each token's offsets. With it, a token of spaces would have no
    characters, and `--train-on completion` would not train on it.
    """

    def __init__(self, tokenizer: Any, end_ids: list[int]) -> None:
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        backend.post_processor = None
        self._backend, self._end_ids = backend, end_ids

    def __call__(self, texts: Sequence[str], with_offsets: bool) -> list[TokenizedText]:
        """Returns each text's tokens followed by `end_ids`; splits long texts to limit memory."""
        if sum(map(len, texts)) <= CHUNK_CHARACTERS:
            return self._tokenize(texts, with_offsets, self._end_ids)
        chunks = [split_text(text) for text in texts]
        batches = batch_chunks(itertools.chain.from_iterable(chunks))
        tokenized = itertools.chain.from_iterable(
            self._tokenize(batch, with_offsets, []) for batch in batches
        )
        return [_join_chunks(text_chunks, tokenized, self._end_ids) for text_chunks in chunks]

    def _tokenize(
        self, texts: Sequence[str], with_offsets: bool, end_ids: list[int]
    ) -> list[TokenizedText]:
        backend = self._backend
        encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
        return [
            TokenizedText(
                np.array(encoding.ids + end_ids, dtype=np.int32),
                np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) if with_offsets else None,
            )
            for encoding in encode(texts, add_special_tokens=False)
        ]


def _join_chunks(
    chunks: Sequence[str], tokenized: Iterator[TokenizedText], end_ids: list[int]
) -> TokenizedText:
    """Takes the tokens of a text's `chunks` from `tokenized`, joins them and appends `end_ids`."""
    parts = list(itertools.islice(tokenized, len(chunks)))
    token_ids = np.concatenate([*(part.token_ids for part in parts), np.array(end_ids, np.int32)])
    starts = itertools.accumulate(map(len, chunks[:-1]), initial=0)
    offsets = [
        part.offsets + start
        for part, start in zip(parts, starts, strict=True)
        if part.offsets is not None
    ]
    return TokenizedText(token_ids, np.concatenate(offsets) if offsets else None)


class SlowTokenizer:
    """A tokenizer written in Python; it gives no offsets."""

    def __init__(self, tokenizer: Any, end_ids: list[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, end_ids

    def __call__(self, texts: Sequence[str], _with_offsets: bool) -> list[TokenizedText]:
        """Returns each text's tokens followed by `end_ids`."""
        tokenized = []
        for text in texts:
            # verbose=False: no warning about documents longer than the model's context.
            encoding = self._tokenizer(text, add_special_tokens=False, verbose=False)
            token_ids = np.array(list(encoding["input_ids"]) + self._end_ids, dtype=np.int32)
            tokenized.append(TokenizedText(token_ids, None))
        return tokenized


def split_text(text: str) -> list[str]:
    """Splits `text` into chunks of at most CHUNK_CHARACTERS.

    If possible, a chunk ends before a single space that is followed by a letter. With the
    byte-level tokenizers of GPT-J and GPT-NeoX, a new token always begins at such a space, so the
    chunks have the same tokens as the complete text. Without such a space near the limit, a chunk
    ends at the limit.
    """
    chunks, start = [], 0
    while len(text) - start > CHUNK_CHARACTERS:
        limit = start + CHUNK_CHARACTERS
        gaps = list(_GAP.finditer(text, limit - SEARCH_CHARACTERS, limit))
        end = gaps[-1].start() if gaps else limit
        chunks.append(text[start:end])
        start = end
    return [*chunks, text[start:]]


def batch_chunks(chunks: Iterable[str]) -> Iterator[list[str]]:
    """Yields lists of chunks; a list ends when its total length reaches BATCH_CHARACTERS."""
    batch: list[str] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
