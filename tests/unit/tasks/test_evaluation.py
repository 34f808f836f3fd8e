"""Tests that evaluation batches have all held-out text once, in order, and score no padding."""

from pathlib import Path
from typing import Any

import pytest

from tasks.evaluation import evaluation_batches
from tests.support.data import make_texts, tokenizer, write_folder, write_jsonl

TEXTS = make_texts(40, seed=3)


def _tokens(texts: list[str]) -> list[int]:
    backend = tokenizer().backend_tokenizer
    return [t for text in texts for t in [*backend.encode(text).ids, 0]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "folder"])
@pytest.mark.parametrize(("seq_len", "rows"), [(16, 4), (64, 3), (10_000, 2), (7, 1)])
def test_the_whole_in_order(tmp_path: Path, name: str, seq_len: int, rows: int) -> None:
    if name == "folder":
        path = write_folder(tmp_path / name, TEXTS)
        expected = _tokens([text for i in range(5) for text in TEXTS[i::5]])
    else:
        path = write_jsonl(tmp_path / name, TEXTS)
        expected = _tokens(TEXTS)
    batches = list(evaluation_batches(str(path), tokenizer(), seq_len=seq_len, rows=rows))
    tokens = [t for batch in batches for t in batch.token_ids.ravel().tolist()]
    padding = [0] * (len(tokens) - len(expected))
    assert tokens == expected + padding
    assert len(tokens) % (seq_len * rows) == 0
    for start in range(0, len(tokens), seq_len):
        labels = [
            expected[t + 1] if t + 1 < min(start + seq_len, len(expected)) else -100
            for t in range(start, start + seq_len)
        ]
        batch, row = divmod(start // seq_len, rows)
        assert batches[batch].labels[row].tolist() == labels


def test_limited(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    options: dict[str, Any] = {"seq_len": 16, "rows": 2}
    every = list(evaluation_batches(path, tokenizer(), **options))
    some = list(evaluation_batches(path, tokenizer(), **options, max_batches=3))
    assert [b.token_ids.tolist() for b in some] == [b.token_ids.tolist() for b in every[:3]]


def test_a_block_that_predicts_nothing_is_left_out(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [""] * 9))
    (batch,) = evaluation_batches(path, tokenizer(), seq_len=8, rows=1)
    assert batch.token_ids.tolist() == [[0] * 8]
    with pytest.raises(ValueError, match=r"a\.jsonl: the source yields nothing to evaluate"):
        list(evaluation_batches(path, tokenizer(), seq_len=8, rows=1, separator=""))


def test_missing(tmp_path: Path) -> None:
    path = str(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"--evaluation-data .*none\.jsonl: there is no such file"):
        evaluation_batches(path, tokenizer(), seq_len=8, rows=1)
