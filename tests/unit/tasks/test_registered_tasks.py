"""Tests the registered tasks, read from a folder in data/ or, if it is missing, from the hub."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from tasks.open import open_source
from tasks.registry import check_source
from tasks.shuffling.buffered import BufferedShuffle
from tasks.shuffling.full import FullShuffle
from tasks.shuffling.shuffle import shuffle_source
from tasks.source_spec import SourceSpec
from tasks.sources.base import BadLineError, Document
from tests.support.data import check_restored_anywhere, make_texts, write_folder
from tests.support.refusal import refusal

NI = Path("data/natural-instructions")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()


def text_and_answer(document: Document | BadLineError) -> tuple[str, str]:
    """Returns a document's text before its completion, and the completion."""
    assert isinstance(document, Document)
    assert document.completions is not None
    ((start, end),) = document.completions
    assert end == len(document.text)
    return document.text[:start], document.text[start:]


def in_order(name: str) -> list[Document | BadLineError]:
    return [record.document for file in open_source(name).files for record in file.read()]


# ---- natural_instructions ----


def write_task(name: str, count: int, **changes: Any) -> list[str]:
    """Writes a natural-instructions task; returns each instance's first output, the trained one."""
    texts = make_texts(count, seed=len(name))
    task = {
        "Definition": [f"Define {name} 漢字."],
        "Positive Examples": [{"input": "no", "output": "no", "Instances": []}],
        "Instances": [{"input": f"in {text}", "output": [text, "another"]} for text in texts],
        **changes,
    }
    (NI / "tasks").mkdir(parents=True, exist_ok=True)
    indent = len(name) % 3 or None
    raw = json.dumps(task, indent=indent, ensure_ascii=count % 2 == 0)
    (NI / "tasks" / f"{name}.json").write_text(raw, encoding="utf-8")
    return texts


def write_list(*names: str) -> None:
    (NI / "splits" / "default").mkdir(parents=True, exist_ok=True)
    (NI / "splits" / "default" / "train_tasks.txt").write_text("\n".join(names) + "\n\n")


@pytest.mark.parametrize("name", ["ni", "natural_instructions"])
def test_instances_of_the_training_tasks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sizes = {"task001_a": 40, "task02_b": 33, "task3_c": 30}
    texts = {task: write_task(task, size) for task, size in sizes.items()}
    write_task("held_out", 20)
    write_task("task4_none", 1, Instances=[])
    write_list(*sizes, "task4_none", "task9_not_there")
    check_source(SourceSpec(name))
    expected = {
        (f"Define {task} 漢字.\n\nInput: in {text}\nOutput:", f" {text}")
        for task in texts
        for text in texts[task]
    }
    assert [text_and_answer(document) for document in in_order(name)][:40] == [
        (f"Define task001_a 漢字.\n\nInput: in {text}\nOutput:", f" {text}")
        for text in texts["task001_a"]
    ]
    documents = shuffle_source(open_source(name), seed=1)
    assert isinstance(documents, FullShuffle)
    for _ in range(2):
        epoch = [documents.next() for _ in range(103)]
        assert {text_and_answer(document) for document in epoch} == expected
    assert len({document.origin.split(":")[0] for document in epoch[:30]}) == 3  # tasks are mixed
    assert "found 4 of 5 training tasks" in caplog.text
    check_restored_anywhere(*(shuffle_source(open_source(name), seed=1) for _ in range(2)))


def test_changed_tasks_are_not_resumed() -> None:
    write_task("task1", 12)
    write_list("task1")
    documents = shuffle_source(open_source("ni"), seed=1)
    documents.next()
    write_task("task1", 13)
    with pytest.raises(ValueError, match="ni: the source changed since the checkpoint"):
        shuffle_source(open_source("ni"), seed=1).restore(documents.state())


BAD_TASKS = [
    (b"[]", "not a task of natural instructions"),
    (b"nonsense", "not a task of natural instructions"),
    (b'{"Definition": ["d"]}', 'expected "Definition" and a list of "Instances"'),
    (b'{"Definition": ["d"], "Instances": {}}', "not a task of natural instructions"),
    (b'{"Definition": ["\xff"], "Instances": []}', "not a task of natural instructions"),
    (
        b'{"Definition": ["d"], "Instances": [' + b"[" * 100_000,
        "not a task of natural instructions",
    ),
    (b'{"Definition": ["d"], "Instances": [3]}', "task1.json:1: expected"),
    (b'{"Definition": ["d"], "Instances": [{"input": 1, "output": ["a"]}]}', '"inputs", got a num'),
    (b'{"Definition": ["d"], "Instances": [{"input": "a", "output": []}]}', '"targets", got null'),
    (b'{"Definition": ["d"], "Instances": []}', "ni: the source holds no document"),
]


@pytest.mark.parametrize(("raw", "reason"), BAD_TASKS)
def test_a_file_that_is_no_task_is_named(raw: bytes, reason: str) -> None:
    write_task("task1", 1)
    write_list("task1")
    (NI / "tasks" / "task1.json").write_bytes(raw)
    assert reason in refusal(lambda: shuffle_source(open_source("ni"), seed=1).next())


def test_a_mark_before_the_task_and_one_string_for_definition() -> None:
    raw = {"Definition": "d", "Instances": [{"input": "a", "output": "b"}]}
    write_task("task1", 1)
    write_list("task1")
    (NI / "tasks" / "task1.json").write_text(json.dumps(raw), encoding="utf-8-sig")
    assert text_and_answer(in_order("ni")[0]) == ("d\n\nInput: a\nOutput:", " b")


def test_a_folder_without_its_list_is_not_taken_from_the_hub() -> None:
    write_task("task1", 1)
    with pytest.raises(ValueError, match=r"ni: .*splits/default/train_tasks.txt: cannot be read"):
        check_source(SourceSpec("ni"))
    write_list("task2")
    with pytest.raises(ValueError, match="tasks: has none of the 1 training tasks"):
        check_source(SourceSpec("ni"))


# ---- p3 ----

PRETOKENIZED = {"inputs_pretokenized": "Is it?", "targets_pretokenized": "No"}
TOKENIZED = {"inputs": [1, 2], "targets": [3], **PRETOKENIZED}
PAIRS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({"inputs": "Is it so?", "targets": "Yes"}, ("Is it so?", " Yes")),
    ({"inputs": "Is it so?\n", "targets": "Yes"}, ("Is it so?\n", "Yes")),
    ({"inputs": "Is it so?", "targets": "\nYes"}, ("Is it so?", "\nYes")),
    ({"inputs": "", "targets": "Yes"}, ("", "Yes")),
    (TOKENIZED, ("Is it?", " No")),
]


def test_prompts_of_the_pool_in_every_kind_of_file() -> None:
    Path("data/p3").mkdir()
    Path("data/p3/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row, _ in PAIRS))
    check_source(SourceSpec("p3"))
    assert isinstance(shuffle_source(open_source("p3"), seed=1), FullShuffle)
    rows = [row for row, _ in PAIRS[:4]]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "data/p3/b.parquet")
    expected = [pair for _, pair in PAIRS] + [pair for _, pair in PAIRS[: len(rows)]]
    assert [text_and_answer(document) for document in in_order("p3")] == expected
    documents = shuffle_source(open_source("p3"), seed=1)
    assert sorted(text_and_answer(documents.next()) for _ in expected) == sorted(expected)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, 'expected a string as "inputs", got null'),
        ({"inputs": "a", "targets": [3]}, 'expected a string as "targets", got a list'),
        (["a"], 'expected an object, "inputs_pretokenized" or'),
    ],
)
def test_a_line_of_another_form_is_named(row: Any, reason: str) -> None:
    Path("data/p3").mkdir()
    Path("data/p3/a.jsonl").write_text(json.dumps(row))
    refused = refusal(lambda: shuffle_source(open_source("p3"), seed=1).next())
    assert refused.startswith("data/p3/a.jsonl:1: ")
    assert reason in refused


def test_a_data_set_saved_in_the_task_s_folder() -> None:
    datasets.Dataset.from_list([row for row, _ in PAIRS[:4]]).save_to_disk("data/p3")
    check_source(SourceSpec("p3"))
    assert [text_and_answer(one) for one in in_order("p3")] == [pair for _, pair in PAIRS[:4]]


# ---- pile ----


def test_the_pile_s_own_files() -> None:
    texts = make_texts(30, seed=3)
    write_folder(Path("data/pile"), texts)
    check_source(SourceSpec("pile"))
    documents = shuffle_source(open_source("pile"), seed=1)
    assert sorted(documents.next().text for _ in texts) == sorted(texts)


def test_an_empty_folder_is_not_taken_from_the_hub() -> None:
    Path("data/pile").mkdir()
    with pytest.raises(ValueError, match=r"--task-name data/pile: the folder holds no \.jsonl"):
        check_source(SourceSpec("pile"))


# ---- from the hub ----

NI_ROW = {"task_name": "t", "id": "1", "definition": "d", "inputs": "a", "targets": "b"}
# task: name on the hub, a row, the row's text, and the folder that is tried first
HUB: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "ni": (
        "Muennighoff/natural-instructions",
        NI_ROW,
        "d\n\nInput: a\nOutput: b",
        "natural-instructions",
    ),
    "p3": ("Muennighoff/P3", {"inputs": "a", "targets": "b"}, "a b", "p3"),
    "pile": ("monology/pile-uncopyrighted", {"text": "a", "meta": {"x": "y"}}, "a", "pile"),
}


@pytest.mark.parametrize("task", HUB)
def test_else_from_the_hub(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, row, text, _ = HUB[task]
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        asked.append((*args, options))
        return datasets.Dataset.from_list([row]).to_iterable_dataset()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check_source(SourceSpec(task))
    documents = shuffle_source(open_source(task), seed=1)
    assert isinstance(documents, BufferedShuffle)
    document = documents.next()
    assert (document.text, document.origin) == (text, f"{name}:1")
    assert asked[0] == (name, None, {"split": "train", "streaming": True})


@pytest.mark.parametrize("task", HUB)
@pytest.mark.parametrize("read", [lambda task: check_source(SourceSpec(task)), in_order])
def test_neither_here_nor_there(
    read: Callable[[str], object], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, _, _, folder = HUB[task]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    line = refusal(lambda: read(task))
    assert line.startswith(
        f"--task-name {task}: {tmp_path}/data/{folder} does not exist: put this data there: "
    )
    assert f"; and {hub} on the hub: Couldn't reach" in line
    assert "\n" not in line
