"""Tests the values of --task-name."""

import json
from pathlib import Path

import pytest

from tasks.registry import check_source
from tasks.source_spec import SourceSpec, parse_task_name
from tests.support.data import write_jsonl
from tests.support.refusal import refusal


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("cot", [("cot", 1.0)]),
        ("cot:0.1,/a.jsonl:1.0,/a.jsonl", [("cot", 0.1), ("/a.jsonl", 1.0), ("/a.jsonl", 1.0)]),
        ("C:/x", [("C:/x", 1.0)]),
        ("/a:b.jsonl", [("/a:b.jsonl", 1.0)]),
        ("/a:b.jsonl:2", [("/a:b.jsonl", 2.0)]),
        ("a:1:2e-1", [("a:1", 0.2)]),
        (" \n a.jsonl:0.2,\n  b.jsonl : 0.3\n", [("a.jsonl", 0.2), ("b.jsonl", 0.3)]),
    ],
)
def test_parsed(value: str, expected: list[tuple[str, float]]) -> None:
    assert parse_task_name(value) == [SourceSpec(*item) for item in expected]


@pytest.mark.parametrize(
    "value", ["", " ", "a,", ",a", "a,,b", ":0.5", "a:0", "a:-1", "a:nan", "a:inf", "a:1e999"]
)
def test_refused(value: str) -> None:
    refused = refusal(lambda: parse_task_name(value))
    assert "--task-name" in refused
    assert value.strip() in refused


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.csv.gz", "--task-name x.csv.gz: expected a registered task (cot, natural_instruc"),
        ("missing.jsonl", "--task-name missing.jsonl: there is no such file"),
        ("./text.txt", "--task-name ./text.txt: expected a registered task"),
        ("nonsense", "--task-name nonsense: expected a registered task"),
        ("/data/a.txt", "--task-name /data/a.txt: there is no such file or folder, expected a reg"),
        ("data/train/", "--task-name data/train/: there is no such file or folder, expected a reg"),
        ("../other/data", "../other/data: there is no such file or folder, expected a registered"),
        ("~/data", "--task-name ~/data: there is no such file or folder, expected a registered"),
        ("two\nlines", "--task-name 'two\\nlines': expected a registered task"),
        ("empty", "--task-name empty: the folder holds no .jsonl, .jsonl.zst, .jsonl.gz or .parq"),
        ("cot", "data/mmlu-cot.json does not exist: put this data there: the chain-of-thought"),
    ],
)
def test_source_refused(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("text.txt").touch()
    assert expected in refusal(lambda: check_source(SourceSpec(name)))


def test_source_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/mmlu-cot.json").write_text(json.dumps({"k": "text"}))
    write_jsonl(Path("data/a.jsonl"), ["a"])
    write_jsonl(Path("b.jsonl.zst"), ["b"])
    Path("data/train").mkdir()  # the hub is not asked for an existing path
    write_jsonl(Path("data/train/a.jsonl"), ["a"])
    for name in ("cot", "data", "data/a.jsonl", "b.jsonl.zst", "data/train"):
        check_source(SourceSpec(name))
