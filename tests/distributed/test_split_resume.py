"""Tests whether a resumed run keeps its checkpoint's split or gets the split of --num-layers."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.alone import run_parts
from tests.support.cases import Case, Told, curve, meet_at, run_folder, train_cases, weights_of
from tests.support.checkpoint_models import reseal
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from training.run_start import RunStart, open_run

Ended = tuple[Path, dict[str, Told]]  # the folder of all runs, and rank 0's log
STEPS, SAVED = 4, 2
LAYERS = 4  # auto gives 3,1: the head has 1.4 times the work of a block
KEPT = "--num-layers auto would give 3,1 now, but the run keeps the checkpoint's 1,3"


def flags(folder: Path, num_layers: str) -> dict[str, Any]:
    return flags_of(f"""
        --model-name {folder}/shards/model --model-type gptneox --num-layers {num_layers}
        --embedding-dim 32 --task-name {folder}/a.jsonl --seq-length 16 --batch-size 2
        --total-steps {STEPS} --checkpoint-steps {SAVED} --lr 1e-3
    """)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """Trains runs of two stages, split 1,3 or 2,2 or 3,1; resumes each; returns rank 0's logs."""
    folder = tmp_path_factory.mktemp("split-resume")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": LAYERS})
    cases = [
        Case("listed", flags(folder, "1,3")),
        Case("even", flags(folder, "2")),
        Case("auto", flags(folder, "auto")),
        Case("listed-auto", flags(folder, "auto"), after=("listed-2-1", SAVED)),
        Case("even-listed", flags(folder, "2,2"), after=("even-2-1", SAVED)),
        Case("auto-even", flags(folder, "3"), after=("auto-2-1", SAVED)),
    ]
    told = run_ranks(2, train_cases, meet_at([(2, 1)]), cases, folder, deadline=200.0)
    return folder, told[0]


@pytest.mark.parametrize(
    ("name", "spelled", "split"),
    [("listed", "auto", "1,3"), ("even", "listed", "2,2"), ("auto", "even", "3,1")],
)
def test_a_run_goes_on_with_its_split(name: str, spelled: str, split: str, ended: Ended) -> None:
    (folder, told), resumed = ended, f"{name}-{spelled}"
    assert curve(folder, resumed, 2, 1) == curve(folder, name, 2, 1)
    assert weights_of(folder, resumed, 2, 1) == weights_of(folder, name, 2, 1)
    meta = json.loads((run_folder(folder, resumed, 2, 1) / str(STEPS) / "meta.json").read_text())
    assert meta["num_layers"] == list(map(int, split.split(",")))
    for run in (name, resumed):
        (line,) = [one for one in told[f"{run}-2-1"].lines if "layers of the stages" in one]
        assert line.startswith(f"layers of the stages: {split}; ")
    kept = [line for line in told[f"{resumed}-2-1"].lines if "--num-layers" in line]
    assert kept == ([KEPT] if name == "listed" else [])


def first_rank(folder: Path, run: Path, num_layers: str, stages: int = 2) -> RunStart:
    """Opens a run on stage 0 to resume it; loads no weights and needs no other stage's process."""
    own = flags_of(f"""
        --checkpoint-path {run} --use-cuda false --pipeline-group-size {stages}
        --world-size {stages}
    """)
    return open_run(**run_parts(flags(folder, num_layers) | own))


@pytest.mark.parametrize(
    ("name", "asked"),
    [("listed", "1,3"), ("listed", "01,3"), ("even", "2"), ("auto", "auto"), ("auto", "3,1")],
)
def test_another_spelling_of_the_same_split_is_no_change(
    name: str, asked: str, ended: Ended, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert first_rank(ended[0], run_folder(ended[0], name, 2, 1), asked).step == STEPS
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "asked", "stages", "line"),
    [
        ("listed", "3,1", 2, "the checkpoint's 2 stages of 1,3 layers become 2 of 3,1"),
        ("listed", "2", 2, "the checkpoint's 2 stages of 1,3 layers become 2 of 2,2"),
        ("even", "3", 2, "the checkpoint's 2 stages of 2,2 layers become 2 of 3,1"),
        ("auto", "2,2", 2, "the checkpoint's 2 stages of 3,1 layers become 2 of 2,2"),
        ("auto", "auto", 1, "the checkpoint's 2 stages of 3,1 layers become 1 of 4"),
        ("listed", "auto", 3, "the checkpoint's 2 stages of 1,3 layers become 3 of 1,2,1"),
    ],
)
def test_another_split_is_told_in_one_line(
    name: str, asked: str, stages: int, line: str, ended: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """One log line names the old and the new split; auto keeps the split unless P changes."""
    run = run_folder(ended[0], name, 2, 1)
    with caplog.at_level(logging.INFO):
        assert first_rank(ended[0], run, asked, stages).step == STEPS
    assert [record.message for record in caplog.records] == [line]


def edited(run: Path, target: Path, **changes: Any) -> Path:
    """Copies a run and changes values in its meta.json; None removes a value."""
    shutil.copytree(run, target)
    for path in target.glob("*/meta.json"):
        meta = json.loads(path.read_text()) | changes
        left_out = [key for key, value in changes.items() if value is None]
        path.write_text(json.dumps({k: v for k, v in meta.items() if k not in left_out}))
        reseal(path.parent)
    return target


@pytest.mark.parametrize(
    ("counts", "stages", "word"),
    [
        ([2, 1], 2, "2,1, a total of 3"),
        ([4], 2, "[4]"),
        (2, 2, "num_layers is 2"),
        (None, None, "missing"),
    ],
)
def test_a_meta_json_that_tells_no_split_of_the_model_is_named(
    counts: Any, stages: Any, word: str, ended: Ended, tmp_path: Path
) -> None:
    run = run_folder(ended[0], "even", 2, 1)
    spoilt = edited(run, tmp_path / "spoilt", num_layers=counts, num_stages=stages)
    with pytest.raises(ValueError) as error:
        first_rank(ended[0], spoilt, "2")
    assert str(spoilt / str(STEPS) / "meta.json") in str(error.value)
    assert word in str(error.value)
