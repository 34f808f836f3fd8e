"""Tests a mixture's weights and restored state; test_stream tests each source's share of blocks."""

from pathlib import Path
from typing import Any

import pytest

from tasks.mixture import BlockStream
from tasks.source_spec import SourceSpec, parse_task_name
from tasks.stream import open_training_stream
from tests.support.data import make_texts, tokenizer, write_folder, write_jsonl


def _stream(specs: list[SourceSpec], **changes: Any) -> BlockStream:
    options: dict[str, Any] = {"seq_len": 24, "seed": 42, "chunk_documents": 8} | changes
    return open_training_stream(specs, tokenizer(), **options)


def _two_sources(tmp_path: Path) -> list[SourceSpec]:
    first = write_folder(tmp_path / "folder", make_texts(50, seed=1))
    second = write_jsonl(tmp_path / "b.jsonl.zst", make_texts(30, seed=2, longest=300))
    return parse_task_name(f"{first}:0.3,{second}:0.7")


def test_weights_may_be_huge(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["a"])
    stream = _stream([SourceSpec(str(path), 1e308)] * 3)
    for _ in range(30):
        stream.next_block()
    assert all(source["epoch"] > 0 for source in stream.state()["sources"])


def test_a_path_given_twice_has_two_orders(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(50, seed=1))
    stream = _stream([SourceSpec(str(path))] * 2)
    blocks = [tuple(stream.next_block().token_ids) for _ in range(20)]
    assert len(set(blocks)) == 20


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"seq_len": 25}, "--seq-length 25: .* 24"),
        ({"seed": 1}, "--seed 1: .* 42"),
        ({"separator": "\n"}, r"--doc-separator '\\n': .* \(none\)"),
    ],
)
def test_another_stream_is_not_restored(tmp_path: Path, changes: dict[str, Any], flag: str) -> None:
    specs = _two_sources(tmp_path)
    with pytest.raises(ValueError, match=flag):
        _stream(specs, **changes).restore(_stream(specs).state())


def test_another_mixture_is_not_restored(tmp_path: Path) -> None:
    specs = _two_sources(tmp_path)
    state = _stream(specs).state()
    with pytest.raises(ValueError, match=r"--task-name .*:1: .* written with .*:0\.3,.*:0\.7"):
        _stream(specs[:1]).restore(state)
    _stream([SourceSpec(spec.name, spec.weight * 2) for spec in specs]).restore(state)
