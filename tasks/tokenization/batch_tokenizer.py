"""Tokenization of many texts at once: the same ids as transformers, with bounded memory."""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK_CHARACTERS = 1 << 20  # the longest text that is tokenized at once
BATCH_CHARACTERS = 1 << 22  # of all texts that are tokenized at once
SEARCH_CHARACTERS = 1 << 14  # of the end of a chunk, in which a gap is searched for
_GAP = re.compile(r"(?<=\S) (?=[^\W\d_])")  # one space between a word and a letter


class TokenizedText(NamedTuple):
    """The tokens of a text, with the end-of-text token, if there is one.

    token_ids: int32 (n,).
    offsets: int64 (m, 2), the first and last (exclusive) character of each of the text's own
        tokens; None where they were not asked for.
    """

    token_ids: NDArray[np.int32]
    offsets: NDArray[np.int64] | None


class FastTokenizer:
    """The tokenizers library without the work that transformers adds for each text.

    Processes that unpickle it need not import transformers. The tokenizer's post-processor is left
    out: it adds special tokens, and excludes white space from a token's characters (GPT-NeoX's
    does), so that spaces in an answer would belong to no token.
    """

    def __init__(self, tokenizer: Any, end_ids: list[int]) -> None:
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
        backend.post_processor = None
        self._backend, self._end_ids = backend, end_ids

    def __call__(self, texts: Sequence[str], with_offsets: bool) -> list[TokenizedText]:
        """Returns the tokens of each text and `end_ids`; splits long texts to bound the memory."""
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
    """Joins the tokens of a text's chunks, which are the next of `tokenized`, and `end_ids`."""
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
    """A tokenizer written in Python, which has no offsets."""

    def __init__(self, tokenizer: Any, end_ids: list[int]) -> None:
        self._tokenizer, self._end_ids = tokenizer, end_ids

    def __call__(self, texts: Sequence[str], _with_offsets: bool) -> list[TokenizedText]:
        """Returns the tokens of each text and `end_ids`."""
        tokenized = []
        for text in texts:
            # verbose=False: no warning about documents longer than the model's context.
            encoding = self._tokenizer(text, add_special_tokens=False, verbose=False)
            token_ids = np.array(list(encoding["input_ids"]) + self._end_ids, dtype=np.int32)
            tokenized.append(TokenizedText(token_ids, None))
        return tokenized


def split_text(text: str) -> list[str]:
    """Splits `text` into chunks of at most CHUNK_CHARACTERS, each but the first from a space on.

    Byte-level tokenizers, such as those of GPT-J and GPT-NeoX, never merge across such a space: the
    tokens are those of the whole text. Without a space nearby, the text is split anywhere.
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
    """Yields lists of chunks with BATCH_CHARACTERS in all, or one chunk more."""
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
