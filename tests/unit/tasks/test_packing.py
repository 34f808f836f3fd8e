"""Tests packed blocks against a naive reference, and the restore of a packer inside a document."""

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tasks.open import open_source
from tasks.packing.concat import Packer
from tasks.shuffling.buffered import BufferedShuffle
from tasks.tokenization.encoder import Encoder
from tests.support.data import (
    check_blocks_restored_anywhere,
    make_texts,
    packed,
    tokenizer,
    write_folder,
    write_jsonl,
)

TEXTS = make_texts(60, seed=2)


def _documents(path: Path) -> BufferedShuffle:
    return BufferedShuffle(open_source(str(path)), seed=3, chunk_documents=16)


def _pack(path: Path, seq_len: int, separator: str | None = None) -> Packer:
    return packed(_documents(path), Encoder(tokenizer(), separator), seq_len)


def _texts(path: Path) -> Iterator[str]:
    documents = _documents(path)
    while True:
        yield documents.next().text


def _naive_blocks(texts: Iterable[str], seq_len: int, separator: str | None) -> Iterator[list[int]]:
    backend = tokenizer().backend_tokenizer
    tokens: list[int] = []
    for text in texts:
        if separator is None:
            tokens += [*backend.encode(text, add_special_tokens=False).ids, 0]
        else:
            tokens += backend.encode(separator + text, add_special_tokens=False).ids
        while len(tokens) >= seq_len:
            yield tokens[:seq_len]
            tokens = tokens[seq_len:]


@pytest.mark.parametrize("separator", [None, "\n", ""])
@pytest.mark.parametrize("seq_len", [2, 31, 500])
def test_blocks_equal_a_naive_packing(tmp_path: Path, seq_len: int, separator: str | None) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = _pack(path, seq_len, separator)
    num_blocks = 200 if seq_len < 500 else 30  # covers several epochs
    for expected in itertools.islice(_naive_blocks(_texts(path), seq_len, separator), num_blocks):
        block = packed.next_block()
        assert block.token_ids.tolist() == expected
        assert block.token_ids.dtype == np.int64
        assert block.trained.dtype == np.bool_
        assert block.trained.all()


@pytest.mark.parametrize("separator", [None, "\n"])
def test_restored_anywhere(tmp_path: Path, separator: str | None) -> None:
    """A packer can be restored after any block, even in the middle of a long document."""
    texts = [*TEXTS, " ".join(make_texts(60, seed=5))]
    path = write_folder(tmp_path / "folder", texts)
    check_blocks_restored_anywhere(lambda: _pack(path, 32, separator))


def test_long_documents_warn_of_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = " ".join(TEXTS)
    assert len(tokenizer().tokenize(text, verbose=False)) > tokenizer().model_max_length
    logging.getLogger("transformers").addHandler(caplog.handler)
    _pack(write_jsonl(tmp_path / "a.jsonl", [text]), 64).next_block()
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.text == ""


def test_a_source_without_tokens_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [""] * 40)
    with pytest.raises(ValueError, match=r"a\.jsonl: the source yields no token"):
        _pack(path, 8, separator="").next_block()
    assert _pack(path, 8).next_block().token_ids.tolist() == [0] * 8


def test_documents_need_an_end(tmp_path: Path) -> None:
    class NoEnd:
        eos_token_id, is_fast = None, False

    with pytest.raises(ValueError, match=r"no eos_token .* --doc-separator"):
        Encoder(NoEnd())
    Encoder(NoEnd(), "\n")


def test_a_document_that_shrank_is_not_resumed(tmp_path: Path) -> None:
    packed = _pack(write_jsonl(tmp_path / "a.jsonl", [" ".join(TEXTS)]), 32)
    for _ in range(10):
        packed.next_block()
    other = _pack(write_jsonl(tmp_path / "a.jsonl", ["short"]), 32)
    with pytest.raises(ValueError, match=r"a\.jsonl: the source changed since the checkpoint"):
        other.restore(packed.state())
