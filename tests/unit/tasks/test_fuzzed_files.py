"""Tests that random or damaged files can be read, or give a one-line error with the file's name."""

import gzip
import io
import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from tasks.open import open_source
from tasks.shuffling.buffered import BufferedShuffle
from tasks.shuffling.shuffle import Shuffle, shuffle_source
from tasks.source_spec import SourceSpec
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import BadLineError, Document
from tasks.sources.jsonl import JsonlRows
from tasks.sources.rows import TEXT_OR_CHAT
from tasks.stream import open_training_stream
from tests.support.data import tokenizer

FUZZED = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXTS = ["good", "good", "", "é 漢字", "long " * 50]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
PACK: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": bytes,
    "jsonl.gz": lambda raw: gzip.compress(raw, mtime=0),
    "jsonl.zst": zstandard.compress,
}


def an_epoch(documents: Shuffle) -> Iterator[str]:
    document = documents.next()
    while documents.epoch == 0:
        yield document.text
        document = documents.next()


def error_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def read_all(path: Path, *, is_buffered: bool = False) -> tuple[list[str], int, str | None]:
    """Returns an epoch's texts, the number of skipped lines, and the error that ended the epoch."""
    told = path.parent / "told"
    told.unlink(missing_ok=True)
    bad = BadLines(told, max_share=1.0)
    source = open_source(str(path))
    if is_buffered:
        documents: Shuffle = BufferedShuffle(source, seed=1, chunk_documents=3, bad_lines=bad)
    else:
        documents = shuffle_source(source, seed=1, bad_lines=bad)
    texts: list[str] = []
    error = error_of(lambda: texts.extend(an_epoch(documents)))
    return texts, len(told.read_text().splitlines()) if told.is_file() else 0, error


# ---- lines ----

NO_JSON = st.sampled_from([b"[]", b"null", b'{"text": 1}', b"nul", b'{"text": "a"', b'{"x": "a"}'])
NO_UTF8 = st.binary(max_size=9).map(lambda raw: b"\xff" + raw.replace(b"\n", b""))
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NO_OBJECT = (SCALAR | st.lists(SCALAR, max_size=3)).map(lambda value: json.dumps(value).encode())
GOOD = st.tuples(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.just("twice"), st.booleans()
).map(lambda one: (json.dumps({"text": one[0]}, ensure_ascii=one[1]).encode(), one[0]))
LINE = (
    GOOD
    | (NO_JSON | NO_UTF8 | NO_OBJECT).map(lambda raw: (raw, None))
    | st.sampled_from([b"", b" ", b"\t", b"\r", b" \x0b\x0c "]).map(lambda raw: (raw, ...))
)


ENDED = st.sampled_from([b"\n", b"\r\n"])


@pytest.mark.parametrize(
    ("kind", "is_buffered"),
    [("jsonl", False), ("jsonl", True), ("jsonl.gz", True), ("jsonl.zst", False)],
)
@FUZZED
@given(
    lines=st.lists(st.tuples(LINE, ENDED), max_size=12),
    is_marked=st.booleans(),
    is_ended=st.booleans(),
)
def test_no_line_is_dropped(
    kind: str,
    is_buffered: bool,
    lines: list[tuple[tuple[bytes, object], bytes]],
    is_marked: bool,
    is_ended: bool,
    tmp_path: Path,
) -> None:
    """Each valid line gives a document, even a repeated line; an invalid line is reported."""
    raw = b"".join(line + end for (line, _), end in lines)
    raw = raw if is_ended or not lines else raw.removesuffix(lines[-1][1])
    path = tmp_path / f"a.{kind}"
    path.write_bytes(PACK[kind]((b"\xef\xbb\xbf" if is_marked else b"") + raw))
    good = Counter(text for (_, text), _ in lines if isinstance(text, str))
    num_bad = sum(text is None for (_, text), _ in lines)
    texts, num_skipped, error = read_all(path, is_buffered=is_buffered)
    assert (Counter(texts), num_skipped) == (good, num_bad)
    assert error == (None if good else f"{path}: the source holds no document")


KEYS = st.sampled_from(["text", "prompt", "completion", "messages", "role", "content", "x"])
OBJECT = st.recursive(
    st.none() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
ROLES = st.sampled_from(["user", "assistant", "tool"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text()}), max_size=4)
ROWS = st.lists(OBJECT | st.fixed_dictionaries({"messages": MESSAGES}), max_size=12)


@FUZZED
@given(rows=ROWS, train_on=st.sampled_from(["all", "completion"]))
def test_any_row_becomes_tokens_or_is_named(rows: list[Any], train_on: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts, num_skipped, _ = read_all(path)
    assert len(texts) + num_skipped == len(rows)
    specs, bad = [SourceSpec(str(path))], BadLines(tmp_path / "more", max_share=1.0)
    options = {"seq_len": 8, "seed": 1, "bad_lines": bad, "train_on": train_on}
    stream = open_training_stream(specs, tokenizer(), **options)
    error = error_of(stream.next_block)
    assert error is None or error.startswith(f"{path}: the source ")


# ---- files ----


def table() -> bytes:
    """Returns a small parquet file with two row groups."""
    file = io.BytesIO()
    texts = [{"text": text, "messages": None} for text in TEXTS]
    messages = [{"text": None, "messages": [{"role": "user", "content": "a"}]}]
    parquet.write_table(pyarrow.Table.from_pylist([*texts, *messages]), file, row_group_size=3)
    return file.getvalue()


WHOLE = {kind: pack(LINES) for kind, pack in PACK.items()} | {"parquet": table()}


def check_told(path: Path) -> None:
    """Checks that the file is read without an error, or that a one-line error names the file."""
    *_, error = read_all(path)
    assert error is None or (str(path) in error and "\n" not in error), error


@pytest.mark.parametrize("kind", WHOLE)
@FUZZED
@given(raw=st.binary(max_size=200))
@example(raw=b"PAR1")
@example(raw=b"PAR1" * 3)
@example(raw=b"PAR1\xff\xff\xff\x7fPAR1")
def test_noise(kind: str, raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(raw)
    check_told(path)


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_with_bytes_that_are_others(kind: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"a.{kind}", WHOLE[kind]
    draw = random.Random(1)
    for _ in range(80):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path.write_bytes(raw)
        check_told(path)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_a_file_that_was_cut_at_any_byte(kind: str, tmp_path: Path) -> None:
    """A cut file always gives an error, and a part of a line never becomes a document."""
    path, whole = tmp_path / f"a.{kind}", WHOLE[kind]
    for cut in range(0, len(whole), 11 if kind == "parquet" else 1):
        path.write_bytes(whole[:cut])
        texts, num_skipped, error = read_all(path)
        assert error is not None
        assert str(path) in error
        assert "\n" not in error
        assert num_skipped == 0
        assert set(texts) <= set(TEXTS)


def test_texts_of_a_table_that_are_null_or_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array([b"a", None, b"b", b"\xc3"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": texts}), path)
    texts_read, num_skipped, error = read_all(path)
    assert (sorted(texts_read), num_skipped, error) == (["a", "b"], 2, None)
    told = sorted((tmp_path / "told").read_text().splitlines())
    assert [line.split(": ")[0] for line in told] == [f"{path}:2", f"{path}:4"]


def test_columns_of_a_table_that_are_no_utf8(tmp_path: Path) -> None:
    path, file = tmp_path / "a.parquet", io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["a"], "other": [1]}), file, store_schema=False)
    path.write_bytes(file.getvalue().replace(b"other", b"\xffther"))
    *_, error = read_all(path)
    assert error is not None
    assert error.startswith(f"{path}: not valid parquet: ")


@pytest.mark.parametrize("kind", [*PACK, "parquet"])
def test_a_huge_line(kind: str, tmp_path: Path) -> None:
    path, huge = tmp_path / f"a.{kind}", "漢 12" * 1_000_000
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": ["before", huge, "after"]}), path)
    else:
        rows = [{"text": text} for text in ("before", huge, "after")]
        raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_bytes(PACK[kind](raw.encode()))
    texts, _, error = read_all(path)
    assert sorted(texts) == ["after", "before", huge]
    assert error is None


# ---- a file that changes while it is read ----


def content(lengths: list[int]) -> bytes:
    return b"".join(b'{"text": "%s"}\n' % (b"a" * length) for length in lengths)


ONE_LINE = len(content([0]))


@FUZZED
@given(
    lengths=st.lists(st.integers(0, 30), min_size=2, max_size=6),
    moved=st.integers(0, 30),
    kind=st.sampled_from(["moved", "joined", "split"]),
    is_ended=st.booleans(),
    data=st.data(),
)
def test_an_edit_that_keeps_the_size_is_seen_or_read_as_it_is(
    lengths: list[int], moved: int, kind: str, is_ended: bool, data: st.DataObject, tmp_path: Path
) -> None:
    """After an edit, a read returns one complete line of the new file, or it fails."""
    edited = list(lengths)
    place = data.draw(st.integers(0, len(lengths) - 2))
    if kind == "moved":
        moved = min(moved, edited[place])
        edited[place], edited[place + 1] = edited[place] - moved, edited[place + 1] + moved
    else:
        edited[place : place + 2] = [sum(edited[place : place + 2]) + ONE_LINE]
    if kind == "split":
        lengths, edited = edited, lengths
    before, after = (content(one)[: None if is_ended else -1] for one in (lengths, edited))
    assert len(before) == len(after)
    path = tmp_path / "a.jsonl"
    path.write_bytes(before)
    rows = JsonlRows([str(path)], TEXT_OR_CHAT)
    path.write_bytes(after)
    starts = [sum(lengths[:n]) + n * ONE_LINE for n in range(len(lengths))]
    now = {sum(edited[:n]) + n * ONE_LINE: length for n, length in enumerate(edited)}
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if now.get(start) == length:
            assert rows.read(number) == Document("a" * length, f"{path}:{number + 1}")
        else:
            with pytest.raises(ValueError, match="changed after its lines were indexed") as told:
                rows.read(number)
            assert str(told.value).startswith(f"{path}:{number + 1}: ")
            assert not isinstance(told.value, BadLineError)  # a BadLineError could be skipped


@pytest.mark.parametrize("more", [b"tail", b'\n{"text": "a"}\n', b"\n"])
def test_a_last_line_without_an_end_that_grows(more: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content([1, 2])[:-1])
    rows = JsonlRows([str(path)], TEXT_OR_CHAT)
    with path.open("ab") as file:
        file.write(more)
    assert rows.read(0) == Document("a", f"{path}:1")
    with pytest.raises(ValueError, match=r"a.jsonl:2: the file changed after its lines"):
        rows.read(1)


def test_an_edit_within_a_line_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content([3, 3]))
    rows = JsonlRows([str(path)], TEXT_OR_CHAT)
    path.write_bytes(content([3, 3]).replace(b"aaa", b"bbb"))
    assert rows.read(1) == Document("bbb", f"{path}:2")


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_whose_name_is_no_utf8(kind: str, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff." + kind.encode())
    path.write_bytes(WHOLE[kind] if kind == "parquet" else PACK[kind](b"nonsense\n" + LINES))
    texts, num_skipped, error = read_all(path)
    assert (len(texts), num_skipped, error) == ((6, 0, None) if kind == "parquet" else (5, 1, None))
    documents = shuffle_source(open_source(str(path)), seed=1, bad_lines=BadLines(tmp_path / "x"))
    json.dumps(documents.state())


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content([3]))
    rows = JsonlRows([str(path)], TEXT_OR_CHAT)
    path.unlink()
    for ask in (lambda: rows.read(0), lambda: rows.digest):
        with pytest.raises(ValueError, match=r"a\.jsonl.*: No such file"):
            ask()
