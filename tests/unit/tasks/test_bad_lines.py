"""Tests that bad lines are skipped, counted and reported once, and that too many end the run."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from tasks.evaluation import evaluation_batches
from tasks.mixture import BlockStream
from tasks.open import open_source
from tasks.shuffling.shuffle import shuffle_source
from tasks.source_spec import SourceSpec
from tasks.sources.bad_lines import BadLines
from tasks.stream import open_training_stream
from tests.support.data import check_blocks_restored_anywhere, make_texts, tokenizer

TEXTS = make_texts(40, seed=1)
BAD = {5: b"nonsense", 17: b'{"text": 3}', 33: b'{"messages": []}'}
ODD_ROLE = b'{"messages": [{"role": "narrator", "content": "once"}]}'


def content(bad: dict[int, bytes] = BAD) -> bytes:
    """Returns TEXTS as JSON lines, with each bad line at its line number, counted from 1."""
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    for number, line in bad.items():
        lines.insert(number - 1, line)
    return b"\n".join(lines)


def write(path: Path, bad: dict[int, bytes] = BAD) -> Path:
    raw = content(bad)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_others_are_all_there_and_the_bad_ones_named_once(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    path, told = write(tmp_path / name), tmp_path / "run" / "bad_lines.txt"
    for _ in range(2):  # a run, and a resumed run
        bad = BadLines(told, max_share=0.01)
        documents = shuffle_source(open_source(str(path)), seed=1, bad_lines=bad)
        epochs = [[documents.next().text for _ in TEXTS] for _ in range(3)]
        assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    lines = sorted(told.read_text().splitlines())
    assert [line.split(": ")[0] for line in lines] == sorted(f"{path}:{n}" for n in BAD)
    assert 'expected a string as "text", got a number' in " ".join(lines)
    assert caplog.text.count("skipped: ") == 2


def test_a_conversation_that_cannot_be_written_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {2: ODD_ROLE})
    clean = write(tmp_path / "b.jsonl", {})
    bad = BadLines(tmp_path / "bad", max_share=0.01)
    batches = [
        list(evaluation_batches(str(p), tokenizer(), seq_len=16, rows=2, bad_lines=bad))
        for p in (path, clean)
    ]
    for found, expected in zip(*batches, strict=True):
        assert found.token_ids.tolist() == expected.token_ids.tolist()
    assert f"{path}:2: expected a role of" in (tmp_path / "bad").read_text()


def test_a_stream_resumes_over_bad_lines(tmp_path: Path) -> None:
    spec = SourceSpec(str(write(tmp_path / "a.jsonl", {**BAD, 20: ODD_ROLE})))

    def opened() -> BlockStream:
        bad = BadLines(tmp_path / "bad", max_share=0.2)
        return open_training_stream([spec], tokenizer(), seq_len=24, seed=1, bad_lines=bad)

    check_blocks_restored_anywhere(opened)


@pytest.mark.parametrize(
    ("bad", "share", "stops"), [(10, 0.01, False), (11, 0.01, True), (1, 0.0, True)]
)
def test_too_many_end_the_run(bad: int, share: float, stops: bool, tmp_path: Path) -> None:
    """A run ends if the number of bad lines exceeds share * max(number of lines read, 1000)."""
    path = write(tmp_path / "a.jsonl", dict.fromkeys(range(1, bad + 1), b"[]"))
    lines = BadLines(tmp_path / "bad", max_share=share)
    documents = shuffle_source(open_source(str(path)), seed=1, bad_lines=lines)
    if not stops:
        assert sorted(documents.next().text for _ in TEXTS) == sorted(TEXTS)
        return
    with pytest.raises(ValueError, match=rf"{bad} of \d+ lines are bad, more than --max-bad-share"):
        [documents.next() for _ in range(len(TEXTS) + 1)]  # one epoch and one document


def test_the_share_is_of_the_lines_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 3960 + b"bad\n" * 40)
    lines = BadLines(tmp_path / "bad", max_share=0.02)
    documents = shuffle_source(open_source(str(path)), seed=1, bad_lines=lines)
    assert [documents.next().text for _ in range(3960)] == ["a"] * 3960
    assert len((tmp_path / "bad").read_text().splitlines()) == 40


def test_a_cut_file_is_not_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-9])
    lines = BadLines(tmp_path / "bad", max_share=1.0)
    documents = shuffle_source(open_source(str(path)), seed=1, bad_lines=lines)
    with pytest.raises(ValueError, match="the gzip data is truncated"):
        documents.next()
