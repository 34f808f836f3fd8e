"""Tests that all kinds of data files give the same documents, and that errors name bad lines."""

import gzip
import json
from collections.abc import Callable
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
from tests.support.data import make_texts, packed, tokenizer
from tests.support.refusal import refusal

ROWS: list[dict[str, Any]] = [
    *({"text": text} for text in make_texts(20, seed=4)),
    {"prompt": "two and two:", "completion": " four"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def write_all(folder: Path) -> dict[str, Path]:
    """Writes ROWS to a file of each kind; gzip has two members, parquet has 7 rows per group."""
    paths = {kind: folder / f"a.{kind}" for kind in ("jsonl", "jsonl.gz", "jsonl.zst", "parquet")}
    half = len(LINES) // 2
    paths["jsonl"].write_bytes(LINES)
    paths["jsonl.gz"].write_bytes(gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]))
    paths["jsonl.zst"].write_bytes(zstandard.compress(LINES))
    columns = dict.fromkeys(("text", "prompt", "completion", "messages", "other"))
    table = pyarrow.Table.from_pylist([{**columns, "other": 1, **row} for row in ROWS])
    parquet.write_table(table, paths["parquet"], row_group_size=7)
    return paths


def read(path: Path) -> list[Document]:
    (file,) = open_source(str(path)).files
    documents = []
    for record in file.read():
        if isinstance(record.document, BadLineError):
            raise record.document
        documents.append(record.document)
    return documents


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_has_the_same_documents(kind: str, tmp_path: Path) -> None:
    """Every kind of file gives the same documents, and reading can start after any record."""
    path = write_all(tmp_path)[kind]
    (file,) = open_source(str(path)).files
    records = list(file.read())
    for index, record in enumerate(records):
        assert list(file.read(record.offset, record.line)) == records[index + 1 :]
    found = read(path)
    for number, (document, row) in enumerate(zip(found, ROWS, strict=True), 1):
        assert document.origin == f"{path}:{number}"
        if "text" in row:
            assert (document.text, document.completions) == (row["text"], None)
    assert (found[-2].text, found[-2].completions) == ("two and two: four", ((12, 17),))
    assert found[-1].messages == (ChatMessage("user", "a"), ChatMessage("assistant", "b"))


def answers(path: Path) -> Packer:
    """Returns a packer of a file's documents; only tokens of completions are trained."""
    documents = BufferedShuffle(open_source(str(path)), seed=1)
    return packed(documents, Encoder(tokenizer(), train_on="completion"), 16)


def test_blocks_that_train_nothing_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "fox " * 200, "completion": "dog"}) + "\n")
    stream = answers(path)
    assert all(stream.next_block().trained[1:].any() for _ in range(5))
    encoder = Encoder(tokenizer(), train_on="completion")
    assert 1 <= len(list(pack_concat(map(encoder.encode, read(path)), 16))) <= 2


def test_a_source_that_trains_nothing_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"text": "<human>: fox?\n" * 9}) + "\n")
    with pytest.raises(ValueError, match=r"asked.jsonl: the source yields no token to train \(--t"):
        answers(path).next_block()


DAMAGES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("jsonl.gz", lambda raw: raw[:-9], ":23: the gzip data is truncated"),
    ("jsonl.zst", lambda raw: raw[:-5], ":1: the zstd data is truncated"),
    ("jsonl.zst", lambda raw: raw + raw[:10], ":23: the zstd data is truncated"),
    ("parquet", lambda raw: raw[:-9], ": not valid parquet"),
    ("jsonl.gz", lambda raw: b"plain", ":1: not valid gzip data: "),
    ("jsonl.zst", lambda raw: b"plain", ":1: not valid zstd data: "),
]


@pytest.mark.parametrize(("kind", "damage", "reason"), DAMAGES)
def test_a_damaged_file_is_named(
    kind: str, damage: Callable[[bytes], bytes], reason: str, tmp_path: Path
) -> None:
    path = write_all(tmp_path)[kind]
    path.write_bytes(damage(path.read_bytes()))
    assert f"/a.{kind}{reason}" in refusal(lambda: read(path))


def test_a_table_without_a_column_that_counts(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: it has none of the columns text, prompt, "):
        read(tmp_path / "a.parquet")


# ---- lines and files without documents: the error names file, line and reason ----

GOOD = b'{"text": "good"}\n'
BAD_LINES = [
    (b"nonsense", "not JSON"),
    (b'{"text": "cut', "not JSON"),
    (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
    (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
    ('{"text": "utf-16"}'.encode("utf-16"), "not UTF-8"),
    (b'["text"]', '{"messages": [...]}, got a list'),
    (b'"text"', "got a string"),
    (b"null", "got null"),
    (b"12", "got a number"),
    (b"{}", 'the object has no "text"'),
    (b'{"Text": "a"}', 'the object has no "text"'),
    (b'{"text": null}', 'expected a string as "text", got null'),
    (b'{"text": true}', "got a boolean"),
    (b'{"text": {"a": 1}}', "got an object"),
    (b'{"text": "\\ud800"}', "lone surrogate"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
    (b'\xef\xbb\xbf{"text": "a mark in the middle"}', "not JSON"),
    (b'{"prompt": "a"}', 'no "text"'),
    (b'{"prompt": 1, "completion": "a"}', 'expected a string as "prompt", got a number'),
    (b'{"messages": []}', "got an empty list"),
    (b'{"messages": {"role": "user"}}', "got an object"),
    (b'{"messages": ["a"]}', "messages[0]: expected"),
    (b'{"messages": [{"role": "user"}]}', 'expected a string as "messages[0].content", got null'),
]


def _error(source: str | Path) -> str:
    return refusal(lambda: BufferedShuffle(open_source(str(source)), seed=0).next())


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line(line: bytes, reason: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad.{suffix}"
    content = GOOD + b"\n" + line + b"\n" + GOOD
    path.write_bytes(zstandard.compress(content) if suffix.endswith("zst") else content)
    error = _error(path)
    assert error.startswith(f"{path}:3: ")
    assert reason in error


def test_vanished_file(tmp_path: Path) -> None:
    path = tmp_path / "gone.jsonl"
    path.write_bytes(GOOD)
    documents = BufferedShuffle(open_source(str(path)), seed=0)
    path.unlink()
    with pytest.raises(ValueError, match=r"gone\.jsonl: No such file"):
        documents.next()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON in UTF-8"),
        (b"\xff", "not JSON in UTF-8"),
        (b"[]", "expected one object {key: text}"),
        (b'{"a": 1}', 'mmlu-cot.json:a: expected a string as "text", got a number'),
        (b"{}", "holds no document"),
    ],
)
def test_bad_cot(
    content: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/mmlu-cot.json").write_bytes(content)
    assert reason in _error("cot")
