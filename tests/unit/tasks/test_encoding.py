"""Tests that the encoder's tokens are the tokenizer's, even if it cuts texts or adds separators."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tasks.sources.base import BadLineError, Document
from tasks.tokenization import batch_tokenizer
from tasks.tokenization.batch_tokenizer import batch_chunks, split_text
from tasks.tokenization.encoder import Encoder, overlap
from tests.support.data import make_texts, tokenizer

TEXTS = ["", " ", "<eos> in the text<eos>", "é ü 漢字\r\n\t tabs", *make_texts(50, seed=2)]


def theirs(text: str, **options: Any) -> Any:
    return tokenizer()(text, add_special_tokens=False, verbose=False, **options)


def test_tokens_are_those_of_transformers() -> None:
    documents = [Document(text, "a:1") for text in TEXTS]
    for separator, end in ((None, [0]), ("\n", [])):
        encoded = Encoder(tokenizer(), separator).encode_all(documents)
        for text, one in zip(TEXTS, encoded, strict=True):
            assert not isinstance(one, BadLineError)
            assert one.token_ids.tolist() == theirs((separator or "") + text)["input_ids"] + end
            assert one.trained.all()


def test_what_the_tokenizers_file_cuts_and_pads_is_not(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    right: dict[str, Any] = {"direction": "Right"}
    written["truncation"] = right | {"max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<eos>"}
    written["padding"] = right | {"strategy": {"Fixed": 40}} | pad
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    cutting = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert cutting.backend_tokenizer.truncation["max_length"] == 3
    text = "the quick brown fox jumps"
    token_ids = Encoder(cutting).encode(Document(text, "a:1")).token_ids
    assert token_ids.tolist() == [*theirs(text)["input_ids"], 0]
    assert cutting.backend_tokenizer.truncation["max_length"] == 3, (
        "the caller's tokenizer is unchanged"
    )


@pytest.mark.parametrize("train_on", ["all", "completion"])
def test_a_long_text_goes_through_in_chunks(monkeypatch: pytest.MonkeyPatch, train_on: Any) -> None:
    """A text that is encoded in chunks has the same tokens and trained parts as in one piece."""
    text = "\n".join(make_texts(300, seed=5)).replace("fox", "fox \t ").replace("dog", " 12  dog")
    half = len(text) // 2
    document = Document(text, "a:1", completions=((half, len(text)),))
    whole = Encoder(tokenizer(), train_on=train_on).encode(document)
    monkeypatch.setattr(batch_tokenizer, "CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(batch_tokenizer, "SEARCH_CHARACTERS", 200)
    monkeypatch.setattr(batch_tokenizer, "BATCH_CHARACTERS", 3000)
    parts = split_text(text)
    assert "".join(parts) == text
    assert len(parts) > 20
    assert all(len(part) <= 1000 for part in parts)
    in_parts = Encoder(tokenizer(), train_on=train_on).encode(document)
    np.testing.assert_array_equal(in_parts.token_ids, whole.token_ids)
    np.testing.assert_array_equal(in_parts.trained, whole.trained)
    assert whole.trained.mean() == (1 if train_on == "all" else pytest.approx(0.5, abs=0.05))
    assert whole.token_ids.tolist() == [*theirs(text)["input_ids"], 0]


def test_text_without_a_place_to_cut_is_cut_anyway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_tokenizer, "CHUNK_CHARACTERS", 10)
    assert split_text("x" * 25) == ["x" * 10, "x" * 10, "x" * 5]
    assert split_text("") == [""]


def test_batches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_tokenizer, "BATCH_CHARACTERS", 10)
    assert list(batch_chunks(["abcd"] * 7)) == [["abcd"] * 3, ["abcd"] * 3, ["abcd"]]
    assert list(batch_chunks([])) == []


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=6),
    st.lists(st.tuples(st.integers(-3, 30), st.integers(0, 4)), max_size=6),
)
def test_tokens_are_trained_that_share_a_character_with_an_answer(
    gaps: list[tuple[int, int]], tokens: list[tuple[int, int]]
) -> None:
    """A token is trained if at least one of its characters is inside an answer.

    gaps: for each answer, the gap before it and the answer's length. tokens: start and length of
    each token; a token with a negative start is in the separator before the text.
    """
    spans, end = [], 0
    for gap, length in gaps:
        spans.append((end + gap, end + gap + length))
        end = spans[-1][1]
    answers = {place for span in spans for place in range(*span)}
    places = np.array([(start, start + length) for start, length in tokens]).reshape(-1, 2)
    expected = [not answers.isdisjoint(range(*place)) for place in places.tolist()]
    assert overlap(places, tuple(spans)).tolist() == expected
