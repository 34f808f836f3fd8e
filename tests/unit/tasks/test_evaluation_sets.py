"""Tests the values of --evaluation-data."""

from pathlib import Path

import pytest

from tasks.evaluation_sets import EvaluationSet, check_evaluation_data, parse_evaluation_data
from tests.support.data import write_jsonl
from tests.support.refusal import refusal

# Paths that exist in every test; the meaning of some values depends on whether a path exists.
FILES = ("a,b.jsonl", "lang=en.jsonl", "lang=de/x.jsonl", "time:0.5", "plain/a.jsonl", "b.jsonl")


@pytest.fixture(autouse=True)
def _there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        write_jsonl(path, ["a"])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x.jsonl", [("", "x.jsonl")]),
        (" x.jsonl ", [("", "x.jsonl")]),
        ("wiki=x.jsonl", [("wiki", "x.jsonl")]),
        ("cot,/d/wiki.v2.jsonl.zst", [("cot", "cot"), ("wiki.v2", "/d/wiki.v2.jsonl.zst")]),
        ("/d/wiki/,wiki.parquet.old", [("wiki", "/d/wiki/"), ("wiki.parquet.old",) * 2]),
        ("x.jsonl.gz, x.parquet2", [("x", "x.jsonl.gz"), ("x.parquet2", "x.parquet2")]),
        (" a b = x.jsonl,\n y.parquet", [("a b", "x.jsonl"), ("y", "y.parquet")]),
        ("one=x.jsonl,two=x.jsonl", [("one", "x.jsonl"), ("two", "x.jsonl")]),
        (".jsonl,b.jsonl", [(".jsonl", ".jsonl"), ("b", "b.jsonl")]),
        ("two\nlines=x.jsonl", [("'two\\nlines'", "x.jsonl")]),
        # An existing path is always a path.
        ("a,b.jsonl", [("", "a,b.jsonl")]),
        ("lang=en.jsonl", [("", "lang=en.jsonl")]),
        ("lang=en.jsonl,b.jsonl", [("lang=en", "lang=en.jsonl"), ("b", "b.jsonl")]),
        ("x=lang=en.jsonl", [("x", "lang=en.jsonl")]),
        ("lang=fr.jsonl", [("lang", "fr.jsonl")]),
        ("lang=de/x.jsonl", [("", "lang=de/x.jsonl")]),
        ("/d/lang=fr/x.jsonl", [("", "/d/lang=fr/x.jsonl")]),
        ("time:0.5", [("", "time:0.5")]),
        ("t=time:0.5,b.jsonl", [("t", "time:0.5"), ("b", "b.jsonl")]),
        ("C:/x", [("", "C:/x")]),
    ],
)
def test_parsed(value: str, expected: list[tuple[str, str]]) -> None:
    assert parse_evaluation_data(value) == [EvaluationSet(*item) for item in expected]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "--evaluation-data '': an item is empty, expected [name=]source,..."),
        ("a.jsonl,", "--evaluation-data 'a.jsonl,': an item is empty, expected [name=]source,..."),
        ("a,,b", "--evaluation-data 'a,,b': an item is empty"),
        ("=a.jsonl", "--evaluation-data '=a.jsonl': a name or a source is empty"),
        ("b.jsonl, =a.jsonl", "--evaluation-data 'b.jsonl, =a.jsonl': a name or a source is empty"),
        ("wiki=", "--evaluation-data 'wiki=': a name or a source is empty"),
        (
            "b.jsonl:0.3",
            "--evaluation-data b.jsonl:0.3: there is no such path, and an evaluation set takes no "
            "weight: expected [name=]source",
        ),
        ("b.jsonl,x=cot:2", "--evaluation-data x=cot:2: there is no such path, and an evaluation"),
        (
            "b.jsonl,plain/b.jsonl.gz",
            "--evaluation-data: b.jsonl and plain/b.jsonl.gz are both named b: expected "
            "name=source with a different name for each",
        ),
        ("x=b.jsonl,y=b.jsonl,x=cot", "--evaluation-data: b.jsonl and cot are both named x"),
        ("b=cot,b.jsonl", "--evaluation-data: cot and b.jsonl are both named b"),
    ],
)
def test_refused(value: str, expected: str) -> None:
    assert refusal(lambda: parse_evaluation_data(value)).startswith(expected)


def test_every_source_is_looked_for() -> None:
    check_evaluation_data("plain,b.jsonl,a.jsonl=plain/a.jsonl")
    with pytest.raises(ValueError, match=r"^--evaluation-data no\.jsonl: there is no such file$"):
        check_evaluation_data("b.jsonl,x=no.jsonl")
    with pytest.raises(ValueError, match=r"^--evaluation-data cot: .*mmlu-cot\.json does not"):
        check_evaluation_data("b.jsonl,cot")
