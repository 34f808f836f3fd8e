"""Files that are not what they should be: one line that names file, line and reason."""

import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.open import open_source
from tasks.shuffling.buffered import BufferedShuffle
from tasks.sources.base import BadLineError

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
]


def _error(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        BufferedShuffle(open_source(str(path)), seed=0).next()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst"])
@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_line(line: bytes, reason: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"bad.{suffix}"
    content = GOOD + b"\n" + line + b"\n" + GOOD
    path.write_bytes(zstandard.compress(content) if suffix.endswith("zst") else content)
    error = _error(path)
    assert error.startswith(f"{path}:3: ")
    assert reason in error


def test_truncated_zst(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.zst"
    whole = zstandard.compress(GOOD * 1000)
    path.write_bytes(whole[:-5])
    assert f"{path}:" in _error(path)
    assert "the zstd data is truncated" in _error(path)
    path.write_bytes(whole + whole[:10])
    assert _error(path) == f"{path}:1001: the zstd data is truncated"


def test_no_zst_at_all(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl.zst"
    path.write_bytes(GOOD)
    assert f"{path}:1: not valid zstd data: " in _error(path)


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf\n"])
def test_no_document(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    assert _error(path) == f"{path}: the source holds no document"


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
    with pytest.raises(ValueError) as caught:
        BufferedShuffle(open_source("cot"), seed=0).next()
    assert reason in str(caught.value)


_LINES = st.one_of(
    st.binary(max_size=40),
    st.fixed_dictionaries({"text": st.text(max_size=20)}).map(lambda v: json.dumps(v).encode()),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("text"), inner),
        max_leaves=5,
    ).map(lambda v: json.dumps(v).encode()),
)


def _texts_or_error(path: Path) -> tuple[list[str], str | None]:
    texts = []
    try:
        for record in open_source(str(path)).files[0].read():
            if isinstance(record.document, BadLineError):
                raise record.document
            texts.append(record.document.text)
    except ValueError as error:
        return [], str(error)
    return texts, None


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(_LINES, max_size=4), end=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_any_bytes(name: str, tmp_path: Path, lines: list[bytes], end: bytes) -> None:
    """Either all documents, or a ValueError that names the file; never anything else."""
    path = tmp_path / name
    content = end.join(lines)
    path.write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    texts, error = _texts_or_error(path)
    if error is None:
        filled = [line for line in content.split(b"\n") if line.strip(b"\xef\xbb\xbf \r\n\t\v\f")]
        assert len(texts) == len(filled)
    else:
        assert str(path) in error
        assert "\n" not in error


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(noise=st.binary(max_size=60), cut=st.integers(0, 40))
def test_any_compressed_bytes(tmp_path: Path, noise: bytes, cut: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(GOOD * 3)[:cut] + noise)
    texts, error = _texts_or_error(path)
    assert error is None or str(path) in error
    assert set(texts) <= {"good"}
