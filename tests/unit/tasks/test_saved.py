"""Tests data sets that `datasets` saved: a shuffle reads every row once, a restore is exact."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from tasks.evaluation import evaluation_batches
from tasks.open import open_source
from tasks.registry import check_source
from tasks.shuffling.full import FullShuffle
from tasks.shuffling.shuffle import shuffle_source
from tasks.source_spec import SourceSpec
from tasks.sources.bad_lines import BadLines
from tasks.sources.base import ChatMessage, Document
from tests.support.data import (
    check_restored_anywhere,
    make_texts,
    through_json,
    tokenizer,
    write_jsonl,
)
from tests.support.refusal import refusal

TEXTS = make_texts(103, seed=1)
ROOT = Path(__file__).parents[3]


def save(folder: Path, texts: list[str] = TEXTS) -> Path:
    """Saves a data set in numpy format to three files; its column `number` is not for training."""
    data = datasets.Dataset.from_dict({"number": range(len(texts)), "text": texts})
    data.with_format("numpy").save_to_disk(str(folder), num_shards=3)
    return folder


def opened(path: Path, **options: Any) -> FullShuffle:
    documents = shuffle_source(open_source(str(path)), seed=7, **options)
    assert isinstance(documents, FullShuffle)
    return documents


def test_every_row_once_per_epoch_and_from_anywhere(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved")
    documents = opened(folder)
    assert documents.num_rows == 103
    epochs = [[documents.next() for _ in TEXTS] for _ in range(2)]
    rows = {Document(text, f"{folder}:{number}") for number, text in enumerate(TEXTS, 1)}
    assert all(set(epoch) == rows for epoch in epochs)
    assert epochs[0] != epochs[1]
    check_restored_anywhere(opened(folder), opened(folder))


def test_rows_of_every_form(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a"},
        {"prompt": "b", "completion": "c"},
        {"messages": [{"role": "user", "content": "d"}]},
    ]
    none = dict.fromkeys(("text", "prompt", "completion", "messages"))
    data = datasets.Dataset.from_list([none | row for row in rows]).with_format("numpy")
    data.save_to_disk(str(tmp_path / "saved"))
    (file,) = open_source(str(tmp_path / "saved")).files
    found = [record.document for record in file.read()]
    assert found == [
        Document("a", f"{tmp_path}/saved:1"),
        Document("bc", f"{tmp_path}/saved:2", completions=((1, 2),)),
        Document("", f"{tmp_path}/saved:3", messages=(ChatMessage("user", "d"),)),
    ]
    records = list(file.read())
    assert list(file.read(records[0].offset, records[0].line)) == records[1:]


def test_evaluated_in_order(tmp_path: Path) -> None:
    paths = save(tmp_path / "saved"), write_jsonl(tmp_path / "a.jsonl", TEXTS)
    saved, lines = (
        evaluation_batches(str(path), tokenizer(), seq_len=16, rows=2) for path in paths
    )
    for found, expected in zip(saved, lines, strict=True):
        assert found.token_ids.tolist() == expected.token_ids.tolist()


def test_a_data_set_that_changed_is_not_resumed(tmp_path: Path) -> None:
    documents = opened(save(tmp_path / "saved"))
    for _ in range(55):
        documents.next()
    state = through_json(documents.state())
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")  # as on another machine
    opened(tmp_path / "copy").restore(state)
    other = list(TEXTS)
    other[50] = other[50].swapcase()
    for texts in (other, TEXTS[:-1]):
        shutil.rmtree(tmp_path / "saved")
        with pytest.raises(ValueError, match="saved: the source changed since the checkpoint"):
            opened(save(tmp_path / "saved", texts)).restore(state)
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS)
    with pytest.raises(ValueError, match="in any order, and can now only be read in file"):
        shuffle_source(open_source(str(tmp_path / "a.jsonl.gz")), seed=7).restore(state)


def test_a_change_far_from_a_file_s_ends_is_seen(tmp_path: Path) -> None:
    """A change in the middle of a large file changes the digest.

    The digest covers the fingerprint that `datasets` computes from the data.
    """
    digests = []
    for middle in ("b", "c", "b"):
        data = datasets.Dataset.from_dict({"text": ["a" * 200_000, middle, "a" * 200_000]})
        data.save_to_disk(str(tmp_path / "saved"))
        open_rows = open_source(str(tmp_path / "saved")).open_rows
        assert open_rows is not None
        digests.append(open_rows().digest)
    assert digests[0] == digests[2] != digests[1]


def test_of_several_splits_the_one_to_train_on(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"test": data, "train": data}).save_to_disk(str(tmp_path / "both"))
    check_source(SourceSpec(str(tmp_path / "both")))
    assert opened(tmp_path / "both").next().origin.startswith(f"{tmp_path}/both/train:")
    datasets.DatasetDict({"test": data, "dev": data}).save_to_disk(str(tmp_path / "none"))
    assert refusal(lambda: check_source(SourceSpec(str(tmp_path / "none")))) == (
        f"--task-name {tmp_path}/none: the saved splits are test, dev, there is no split train: "
        f"give the folder of a split, such as {tmp_path}/none/test"
    )
    assert opened(tmp_path / "none" / "test").num_rows == 103


def test_no_column_counts_and_datasets_is_not_imported_to_say_so(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"body": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    code = (
        "import sys; from tasks.registry import *\n"
        f"try: check_source(SourceSpec({str(tmp_path / 'saved')!r}))\n"
        "except ValueError as error: print(error)\n"
        "print({'datasets', 'pyarrow', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    expected = f"{tmp_path}/saved: it has none of the columns text, prompt, completion, messages"
    assert run.stdout == f"{expected}\nset()\n", run.stderr
    assert refusal(lambda: opened(tmp_path / "saved").next()) == expected


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*1-of*.arrow", lambda file: file.write_bytes(file.read_bytes()[:3000])),
        ("*1-of*.arrow", lambda file: file.write_bytes(b"noise" * 1000)),
        ("*1-of*.arrow", Path.unlink),
        ("state.json", lambda file: file.write_text('{"features": [')),
        ("dataset_info.json", lambda file: file.write_text('{"features": [')),
    ],
)
def test_a_broken_data_set_is_named(
    pattern: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = save(tmp_path / "saved")
    (file,) = folder.glob(pattern)
    damage(file)

    def read() -> None:
        check_source(SourceSpec(str(folder)))
        opened(folder).next()

    assert str(folder) in refusal(read)


def test_rows_that_are_no_document_are_skipped_and_named(tmp_path: Path) -> None:
    """Rows whose text is null or not UTF-8 are skipped and named; some programs write such rows."""
    texts = pyarrow.array([b"a", None, b"\xff", b"b"]).view(pyarrow.string())
    data = datasets.Dataset(pyarrow.table({"text": texts}))
    data.save_to_disk(str(tmp_path / "saved"))
    bad = BadLines(tmp_path / "bad", max_share=0.01)
    documents = opened(tmp_path / "saved", bad_lines=bad)
    for _ in range(2):  # two epochs
        assert sorted(documents.next().text for _ in range(2)) == ["a", "b"]
    told = sorted((tmp_path / "bad").read_text().splitlines())
    assert [line.split(": ")[0] for line in told] == [f"{tmp_path}/saved:{n}" for n in (2, 3)]


def test_a_folder_with_files_of_such_names_is_no_data_set(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "state.json").write_text(json.dumps({}))
    assert shuffle_source(open_source(str(tmp_path)), seed=1).next().text == "a"
