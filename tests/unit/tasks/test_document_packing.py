"""Tests `--pack document`: a document that fits in a block is not cut, and no document is lost."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.layers.lm_head import IGNORED
from tasks.open import open_source
from tasks.packing.best_fit import fit, pack_best_fit
from tasks.packing.blocks import TokenBlock, make_batch
from tasks.packing.concat import Packer
from tasks.shuffling.shuffle import shuffle_source
from tasks.tokenization.encoder import EncodedDocument, Encoder
from tests.support.data import (
    check_blocks_restored_anywhere,
    make_texts,
    packed,
    tokenizer,
    write_jsonl,
)

ROOM = 24
EOS = 0


def of_lengths(lengths: list[int]) -> list[EncodedDocument]:
    """Returns documents of these lengths; document i repeats token i + 1, because 0 is padding."""
    return [
        EncodedDocument(np.full(n, i + 1, dtype=np.int32), np.ones(n, dtype=np.bool_))
        for i, n in enumerate(lengths)
    ]


def test_a_literal_group() -> None:
    """At 8 tokens per block, documents of 3, 5, 2, 6, 9 and 4 become 3 + 5, 2 + 6, 8 and 1 + 4."""
    blocks = list(pack_best_fit(of_lengths([3, 5, 2, 6, 9, 4]), 8))
    assert [block.token_ids.tolist() for block in blocks] == [
        [1, 1, 1, 2, 2, 2, 2, 2],
        [3, 3, 4, 4, 4, 4, 4, 4],
        [5, 5, 5, 5, 5, 5, 5, 5],
        [5, 6, 6, 6, 6, 0, 0, 0],
    ]
    assert [block.doc_starts.tolist() for block in blocks if block.doc_starts is not None] == [
        [0, 0, 0, 3, 3, 3, 3, 3],
        [0, 0, 2, 2, 2, 2, 2, 2],
        [0] * 8,
        [0, 1, 1, 1, 1, 5, 5, 5],
    ]
    assert [block.padding for block in blocks] == [0, 0, 0, 3]
    none = IGNORED
    assert make_batch(blocks).labels.tolist() == [
        [1, 1, none, 2, 2, 2, 2, none],
        [3, none, 4, 4, 4, 4, 4, none],
        [5, 5, 5, 5, 5, 5, 5, none],
        [none, 6, 6, 6, none, none, none, none],
    ]


@given(st.lists(st.integers(1, 16), max_size=60))
def test_every_length_is_in_one_bin_that_holds_it(lengths: list[int]) -> None:
    bins = fit(lengths, 16)
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in indices) for indices in bins]
    assert all(total <= 16 for total in sums)
    assert sum(total <= 8 for total in sums) <= 1  # two bins that are half empty would be one
    assert bins == sorted(sorted(indices) for indices in bins)


def source_of(path: Path) -> Packer:
    documents = shuffle_source(open_source(str(path)), seed=1)
    return packed(documents, Encoder(tokenizer()), ROOM, "document")


def documents_of(block: TokenBlock) -> list[list[int]]:
    assert block.doc_starts is not None
    end = len(block.token_ids) - block.padding
    starts = sorted({int(begin) for begin in block.doc_starts[:end]})
    return [block.token_ids[a:b].tolist() for a, b in zip(starts, [*starts[1:], end], strict=True)]


def test_no_document_is_cut_that_fits_and_all_come(tmp_path: Path) -> None:
    """Texts that fit in a block come uncut and about equally often: counts differ by at most 4."""
    texts = make_texts(40, seed=3, longest=60)
    whole = {tuple(tokenizer()(text)["input_ids"] + [EOS]): text for text in texts}
    source = source_of(write_jsonl(tmp_path / "a.jsonl", texts))
    seen = dict.fromkeys(texts, 0)
    cut: list[int] = []
    for _ in range(960):
        for tokens in documents_of(source.next_block()):
            if tuple(tokens) in whole:
                seen[whole[tuple(tokens)]] += 1
            else:
                cut += tokens
    fitting = [n for text, n in seen.items() if len(tokenizer()(text)["input_ids"]) < ROOM]
    assert 10 < len(fitting) < 40
    assert max(fitting) - min(fitting) <= 4, "except documents of the last group"
    long = {token for tokens in whole if len(tokens) > ROOM for token in tokens}
    assert set(cut) <= long, "only documents longer than a block are cut"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst"])
def test_goes_on_from_any_block(tmp_path: Path, kind: str) -> None:
    path = write_jsonl(tmp_path / f"a.{kind}", make_texts(40, seed=3, longest=60))
    check_blocks_restored_anywhere(lambda: source_of(path))


def test_a_document_that_shrank_is_not_resumed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl.zst", make_texts(40, seed=3))
    source = source_of(path)
    for _ in range(20):
        source.next_block()
    write_jsonl(path, ["short"] * 40)
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: the source changed since the checkpoint"):
        source_of(path).restore(source.state())
