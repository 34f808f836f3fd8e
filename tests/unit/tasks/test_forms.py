"""One set of documents in every kind of file, and in every form of line."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from tasks.open import open_source
from tasks.packing.concat import Packer, pack_concat
from tasks.shuffling.buffered import BufferedShuffle
from tasks.sources.base import BadLineError, ChatMessage, Document
from tasks.tokenization.encoder import Encoder
from tests.support.data import make_texts, packed, through_json, tokenizer

ROWS: list[dict[str, Any]] = [
    *({"text": text} for text in make_texts(20, seed=4)),
    {"prompt": "two and two:", "completion": " four"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_all(folder: Path) -> dict[str, Path]:
    """A file of each kind; the compressed ones in two frames, parquet in groups of seven rows."""
    paths = {kind: folder / f"a.{kind}" for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")}
    half = len(LINES) // 2
    paths["jsonl"].write_bytes(LINES)
    paths["jsonl.gz"].write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    paths["jsonl.zst"].write_bytes(zstandard.compress(LINES))
    parquet.write_table(
        pyarrow.Table.from_pylist(
            [
                {"text": None, "prompt": None, "completion": None, "messages": None, "other": 1}
                | row
                for row in ROWS
            ]
        ),
        paths["parquet"],
        row_group_size=7,
    )
    return paths


def read(path: Path, *place: int) -> list[Document]:
    (file,) = open_source(str(path)).files
    documents = []
    for record in file.read(*place):
        if isinstance(record.document, BadLineError):
            raise record.document
        documents.append(record.document)
    return documents


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_has_the_same_documents(kind: str, tmp_path: Path) -> None:
    path = write_all(tmp_path)[kind]
    found = read(path)
    for number, (document, row) in enumerate(zip(found, ROWS, strict=True), 1):
        assert document.origin == f"{path}:{number}"
        if "text" in row:
            assert (document.text, document.completions) == (row["text"], None)
    assert (found[-2].text, found[-2].completions) == ("two and two: four", ((12, 17),))
    assert found[-1].messages == (ChatMessage("user", "a"), ChatMessage("assistant", "b"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_is_read_on_from_any_record(kind: str, tmp_path: Path) -> None:
    (file,) = open_source(str(write_all(tmp_path)[kind])).files
    records = list(file.read())
    for index, record in enumerate(records):
        assert list(file.read(record.offset, record.line)) == records[index + 1 :]


def stream_of(path: str, train_on: Any) -> Packer:
    documents = BufferedShuffle(open_source(path), seed=1, chunk_documents=5)
    return packed(documents, Encoder(tokenizer(), train_on=train_on), 12)


@pytest.mark.parametrize("train_on", ["all", "completion"])
def test_a_stream_of_any_kind_resumes_anywhere(train_on: Any, tmp_path: Path) -> None:
    for path in map(str, write_all(tmp_path).values()):
        stream = stream_of(path, train_on)
        states, blocks = [], []
        for _ in range(40):
            states.append(through_json(stream.state()))
            blocks.append(stream.next_block())
        for state, expected in list(zip(states, blocks, strict=True))[::7]:
            resumed = stream_of(path, train_on)
            resumed.restore(state)
            block = resumed.next_block()
            assert block.token_ids.tolist() == expected.token_ids.tolist()
            assert block.trained.tolist() == expected.trained.tolist()


def test_blocks_that_train_nothing_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "fox " * 200, "completion": "dog"}) + "\n")
    stream = packed(
        BufferedShuffle(open_source(str(path)), seed=1),
        Encoder(tokenizer(), train_on="completion"),
        16,
    )
    assert all(stream.next_block().trained[1:].any() for _ in range(5))
    encoder = Encoder(tokenizer(), train_on="completion")
    assert 1 <= len(list(pack_concat(map(encoder.encode, read(path)), 16))) <= 2


def test_a_source_that_trains_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"text": "<human>: fox?\n" * 9}) + "\n")
    stream = packed(
        BufferedShuffle(open_source(str(path)), seed=1),
        Encoder(tokenizer(), train_on="completion"),
        16,
    )
    with pytest.raises(
        ValueError, match=r"asked.jsonl: the source yields no token to train \(--tr"
    ):
        stream.next_block()


BAD = [
    ({"prompt": "a"}, 'no "text"'),
    ({"prompt": 1, "completion": "a"}, 'expected a string as "prompt", got a number'),
    ({"messages": []}, "got an empty list"),
    ({"messages": {"role": "user"}}, "got an object"),
    ({"messages": ["a"]}, "messages[0]: expected"),
    ({"messages": [{"role": "user"}]}, 'expected a string as "messages[0].content", got null'),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_line_is_named(row: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "good"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert reason in str(caught.value)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    paths = write_all(tmp_path)
    for kind, reason in (("jsonl.gz", "the gzip data is truncated"), ("parquet", "not valid parq")):
        paths[kind].write_bytes(paths[kind].read_bytes()[:-9])
        with pytest.raises(ValueError, match=reason) as caught:
            read(paths[kind])
        assert "\n" not in str(caught.value)
    paths["jsonl.gz"].write_bytes(b"plain")
    with pytest.raises(ValueError, match=r"a.jsonl.gz:1: not valid gzip data: "):
        read(paths["jsonl.gz"])
    parquet.write_table(pyarrow.table({"body": ["a"]}), paths["parquet"])
    with pytest.raises(ValueError, match=r"a.parquet: it has none of the columns text, prompt, "):
        read(paths["parquet"])
