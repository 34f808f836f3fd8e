"""Tests the full shuffle: each line comes once per epoch, in a new order; a restore is exact."""

import json
import logging
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.open import open_source
from tasks.shuffling.full import FullShuffle
from tasks.shuffling.permutation import Permutation
from tasks.shuffling.shuffle import shuffle_source
from tasks.sources import line_index as module
from tasks.sources.line_index import load_line_index
from tests.support.data import check_restored_anywhere, make_texts, write_jsonl

TEXTS = make_texts(103, seed=1)


def write_parts(path: Path, texts: list[str]) -> Path:
    """Writes the texts to three files with blank lines and no final newline; adds an empty file."""
    path.mkdir()
    for part in range(3):
        lines = [json.dumps({"text": text}) for text in texts[part::3]]
        (path / f"{part}.jsonl").write_text("\n \r\n".join(lines))
    (path / "3.jsonl").write_bytes(b"")
    return path


@pytest.fixture(params=[write_jsonl, write_parts])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    written: Path = request.param(tmp_path / "a.jsonl", TEXTS)
    return written


def opened(path: Path, seed: int = 7) -> FullShuffle:
    return FullShuffle(open_source(str(path)), seed=seed)


def take(documents: FullShuffle, count: int) -> list[str]:
    return [documents.next().text for _ in range(count)]


def test_every_document_once_per_epoch_in_new_orders(path: Path) -> None:
    documents = opened(path)
    epochs = [take(documents, len(TEXTS)) for _ in range(3)]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, TEXTS]}) == 4
    first, same, other = (take(opened(path, seed), 103) for seed in (7, 7, 8))
    assert first == same == epochs[0] != other
    check_restored_anywhere(opened(path), opened(path))


def test_the_shuffle_reaches_over_the_whole_source(path: Path) -> None:
    """A document's position in an epoch is independent of its position in the file."""
    order = take(opened(path), len(TEXTS))
    first = sorted(TEXTS.index(text) for text in order[:25])
    assert first[0] < 20
    assert first[-1] > 80


def test_a_source_that_changed_is_not_resumed(path: Path) -> None:
    documents = opened(path)
    take(documents, 55)
    state = documents.state()
    file = path / "1.jsonl" if path.is_dir() else path
    for index in file.parent.glob(".*.lines"):
        index.unlink()  # as if the data was copied to another machine
    os.utime(file, (1, 1))
    opened(path).restore(state)
    whole = file.read_bytes()
    for edited in (whole.replace(b"fox", b"cat", 1), whole + b"\n", whole[:-9]):
        file.write_bytes(edited)
        with pytest.raises(ValueError, match="the source changed since the checkpoint"):
            opened(path).restore(state)


def test_lines_that_moved_in_the_middle_are_seen(tmp_path: Path) -> None:
    """Two swapped lines are detected, though the size, start and end of the file stay the same."""
    texts = ["a" * 100_000, "word", "", "b" * 100_000]
    documents = opened(write_jsonl(tmp_path / "a.jsonl", texts))
    state = documents.state()
    opened(tmp_path / "a.jsonl").restore(state)
    write_jsonl(tmp_path / "a.jsonl", [texts[0], "", "word", texts[3]])
    with pytest.raises(ValueError, match="the source changed since the checkpoint"):
        opened(tmp_path / "a.jsonl").restore(state)


def test_a_buffered_shuffle_is_not_taken_for_this_one(tmp_path: Path) -> None:
    documents = opened(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    with pytest.raises(ValueError, match=r"a.jsonl: the source changed .* read in file order"):
        documents.restore({"epoch": 0, "chunk": 1, "index": 2})


def test_a_file_that_shrinks_meanwhile_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    documents = opened(path)
    documents.next()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a.jsonl:\d+: "):
        take(documents, 100)


# ---- the index ----


def naive(content: bytes) -> list[int]:
    ends = [len(line) for line in content.splitlines(keepends=True)]
    return np.cumsum(ends).tolist() if ends else []


@pytest.mark.parametrize("read_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\n", b"a\nbb", b"\n\na\r\n" * 40])
def test_the_index_is_that_of_python(
    content: bytes, read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READ_BYTES", read_bytes)
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    for _ in range(2):  # built, then loaded
        assert load_line_index(str(path)).ends.tolist() == naive(content)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [".a.jsonl.lines"]


def test_the_index_is_kept_while_it_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    kept = tmp_path / ".a.jsonl.lines"
    made = Counter[str]()
    real = module._build
    monkeypatch.setattr(module, "_build", lambda *args: made.update("m") or real(*args))

    def times_made() -> int:
        before = made["m"]
        assert load_line_index(str(path)).ends.tolist() == naive(path.read_bytes())
        return made["m"] - before

    for happens in (
        lambda: None,
        lambda: kept.write_bytes(kept.read_bytes()[:-3]),  # a crash, or a full disk
        lambda: kept.write_bytes(b"short"),
        lambda: os.utime(path, (5, 5)),
        lambda: path.write_bytes(path.read_bytes() + b"{}\n"),
    ):
        happens()
        assert [times_made(), times_made()] == [1, 0]


def test_where_the_index_cannot_be_kept_it_is_made_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)  # root can write anywhere
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    assert load_line_index(str(path)).ends.tolist() == naive(path.read_bytes())
    assert "cannot be stored (Permission denied)" in caplog.text


def test_where_its_folder_cannot_be_written_the_index_is_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = tempfile.NamedTemporaryFile

    def refuse(**options: Any) -> Any:
        if options["dir"].resolve() == tmp_path:
            raise OSError(30, "Read-only file system")
        return real(**options)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    other = write_jsonl(tmp_path / "b.jsonl", TEXTS[:9])
    for name in (str(path), "a.jsonl", str(other)):
        assert load_line_index(name).ends.tolist() == naive(Path(name).read_bytes())
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2  # built once for each file, for all its paths
    kept = sorted((tmp_path / "home" / ".cache" / "dist-clm-train").iterdir())
    assert sorted(line.split(" is stored as ")[1] for line in told) == [
        f"{one}, because the file's folder cannot be written (Read-only file system)"
        for one in kept
    ]
    path.write_bytes(path.read_bytes() + b"{}\n")
    assert load_line_index(str(path)).ends.tolist() == naive(path.read_bytes())


def test_a_folder_of_many_files_takes_few_descriptors(tmp_path: Path) -> None:
    for number in range(300):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"{number}-{line}" for line in range(3)])
    documents = shuffle_source(open_source(str(tmp_path)), seed=1)
    before = len(os.listdir("/proc/self/fd"))
    found = {documents.next().text for _ in range(900)}
    assert found == {f"{number}-{line}" for number in range(300) for line in range(3)}
    assert len(os.listdir("/proc/self/fd")) <= before + module.MAX_MAPPED + 1


def test_an_index_that_another_process_made_anew_is_not_taken_for_the_old(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    index = load_line_index(str(path))
    write_jsonl(path, TEXTS[:9])
    load_line_index(str(path))
    with pytest.raises(ValueError, match=r"\.a\.jsonl\.lines: another process rebuilt it"):
        index.span(0)
    (tmp_path / ".a.jsonl.lines").unlink()
    with pytest.raises(ValueError, match=r"\.a\.jsonl\.lines: cannot be read any more"):
        index.span(0)


# ---- the order ----


@pytest.mark.parametrize("size", [*range(1, 40), 1023, 1024, 1025, 5000])
def test_a_permutation_has_each_number_once(size: int) -> None:
    for seed in range(3):
        order = Permutation(size, seed)
        assert sorted(order[i] for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [5, 16])
def test_each_number_may_stand_anywhere(size: int) -> None:
    """Over 1000 seeds, all numbers are about equally frequent at a position (chi-square test)."""
    orders = [Permutation(size, seed) for seed in range(1000)]
    for order in orders:
        _ = order[0]  # this computes the later positions, too
    for position in (0, size // 2, size - 1):
        counts = Counter(order[position] for order in orders)
        expected = 1000 / size
        chi_square = sum((counts[n] - expected) ** 2 / expected for n in range(size))
        assert chi_square < (size - 1) + 5 * (2 * (size - 1)) ** 0.5


def test_neighbours_do_not_stay_together() -> None:
    order = Permutation(10_000, 3)
    steps = Counter((order[i + 1] - order[i]) % 10_000 for i in range(9_999))
    assert max(steps.values()) < 10
