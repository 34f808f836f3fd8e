"""Tests shuffles: an epoch has each document once, in a new order; a restore continues it."""

import json
import tracemalloc
from pathlib import Path

import pytest

from tasks.open import open_source
from tasks.shuffling.buffered import BufferedShuffle
from tasks.shuffling.full import FullShuffle
from tasks.shuffling.shuffle import Shuffle
from tests.support.data import check_restored_anywhere, make_texts, write_folder, write_jsonl

TEXTS = make_texts(103, seed=1)


def _open(path: Path, *, seed: int = 7, chunk: int = 10, size: int = 1 << 20) -> BufferedShuffle:
    source = open_source(str(path))
    return BufferedShuffle(source, seed=seed, chunk_documents=chunk, chunk_bytes=size)


def _take(documents: BufferedShuffle, count: int) -> list[str]:
    return [documents.next().text for _ in range(count)]


@pytest.fixture(params=["plain.jsonl", "packed.jsonl.zst", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write = write_folder if request.param == "folder" else write_jsonl
    return write(tmp_path / request.param, TEXTS)


@pytest.mark.parametrize(
    ("chunk", "size"), [(1, 1 << 20), (10, 1 << 20), (1000, 500), (1000, 1 << 20)]
)
def test_every_document_once_per_epoch_in_new_orders(path: Path, chunk: int, size: int) -> None:
    documents = _open(path, chunk=chunk, size=size)
    epochs = [_take(documents, len(TEXTS)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert documents.epoch == 2
    if chunk > 1 or path.is_dir():
        assert len({tuple(epoch) for epoch in [*epochs, TEXTS]}) == 4


def test_a_seed_and_a_state_tell_the_order(path: Path) -> None:
    first, same, other = (_take(_open(path, seed=seed), 103) for seed in (7, 7, 8))
    assert first == same != other
    check_restored_anywhere(_open(path), _open(path))


def test_a_shuffle_reaches_as_far_as_its_chunk(tmp_path: Path) -> None:
    documents = _open(write_jsonl(tmp_path / "a.jsonl", TEXTS), chunk=10)
    order = _take(documents, 100)
    for start in range(0, 100, 10):
        assert sorted(order[start : start + 10]) == sorted(TEXTS[start : start + 10])


@pytest.mark.parametrize("shuffle", [BufferedShuffle, FullShuffle])
def test_where_names_file_and_line(shuffle: type[Shuffle], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two", "x": NaN}\n\n{"text": ""}'
    )
    documents = shuffle(open_source(str(path)), seed=7)
    found = {documents.next() for _ in range(3)}
    expected = {("one", f"{path}:1"), ("two", f"{path}:4"), ("", f"{path}:6")}
    assert {(document.text, document.origin) for document in found} == expected


def test_changed_files_are_not_resumed(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "folder", TEXTS)
    documents = _open(path)
    _take(documents, 55)
    state = documents.state()
    (path / state["file"]).write_bytes(b"")
    with pytest.raises(ValueError, match="folder: the source changed since the checkpoint"):
        _open(path).restore(state | {"offset": 10**6, "index": 99})
    file = write_folder(tmp_path / "edited", [*TEXTS[:-1], TEXTS[-1].upper()]) / state["file"]
    with pytest.raises(ValueError, match=r"edited: .* its files have other sizes or contents$"):
        _open(file.parent).restore(state)
    write_jsonl(path / "more.jsonl", ["more"])
    with pytest.raises(ValueError, match="changed since the checkpoint: 6 files, not 5 files"):
        _open(path).restore(state)


def test_cot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/mmlu-cot.json").write_text(json.dumps({f"key {t}": t for t in TEXTS}))
    documents, *others = (
        BufferedShuffle(open_source("cot"), seed=1, chunk_documents=10) for _ in range(3)
    )
    assert sorted(_take(documents, len(TEXTS))) == sorted(TEXTS)
    check_restored_anywhere(*others)


@pytest.mark.parametrize(("name", "sizes"), [("a.jsonl", (8, 24)), ("a.jsonl.zst", (25, 50))])
def test_memory_does_not_grow_with_the_file(
    tmp_path: Path, name: str, sizes: tuple[int, int]
) -> None:
    """Reading a larger file needs no more memory, even if its compressed text expands a lot."""
    peaks = []
    for megabytes in sizes:
        text = "x" * 10_000
        path = write_jsonl(tmp_path / name, [text] * (megabytes * 100))
        documents = _open(path, chunk=20)
        tracemalloc.start()
        for _ in range(megabytes * 100):
            documents.next()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2 + 1e6
