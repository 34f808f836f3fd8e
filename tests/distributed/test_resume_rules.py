"""Tests, with one rank, which flags a resumed run can change, and what it logs about them."""

import logging
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from arguments.flag_table import fixed_flags
from arguments.settings import Settings
from checkpoint.store import CheckpointStore
from monitor.metrics import read_metrics
from tests.support.alone import run_parts, train_alone
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.models import make_shards
from training.run_start import open_run

STEPS = 4


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trains for four steps, saves checkpoints after steps 2 and 4, and returns the run's flags."""
    folder = tmp_path_factory.mktemp("rules")
    write_jsonl(folder / "a.jsonl", make_texts(20, seed=1))
    write_jsonl(folder / "b.jsonl", make_texts(20, seed=2))
    make_shards(folder, "model", "gptneox", {})
    make_shards(folder, "other", "gptneox", {"rotary_pct": 0.5})
    found = flags_of(f"""
        --model-name {folder}/shards/model --model-type gptneox --num-layers 3 --embedding-dim 32
        --task-name {folder}/a.jsonl:0.3,{folder}/b.jsonl:0.7 --seq-length 16 --batch-size 4
        --micro-batch-size 1 --gradient-accumulate-step 2 --total-steps {STEPS}
        --checkpoint-steps 2 --lr 1e-3 --use-cuda false
    """) | {"checkpoint-path": folder / "run"}
    train_alone(found)
    return found


# flag, value, and words of the error: the flag and both values.
REFUSED: list[tuple[str, Any, tuple[str, ...]]] = [
    ("seed", 43, ("--seed is 43", "42")),
    ("seq-length", 8, ("--seq-length is 8", "16")),
    ("micro-batch-size", 2, ("--micro-batch-size is 2", "with 1")),
    ("batch-size", 2, ("global batch (--batch-size x --data-group-size) is 2", "with 4")),
    ("gradient-accumulate-step", 1, ("--gradient-accumulate-step is 1", "with 2")),
    ("optimizer", "8bit-adam", ("--optimizer is 8bit-adam", "with adam")),
    ("bf16", "true", ("the precision is bf16", "with fp32")),
    ("deterministic", "true", ("--deterministic is True", "with False")),
    ("doc-separator", ";", ("--doc-separator is ;", "with None")),
    ("task-name", "{folder}/a.jsonl:0.5,{folder}/b.jsonl:0.5", ("--task-name is", "0.5", "0.3")),
    ("model-name", "{folder}/shards/other", ("--model-name", "0.5", "0.25")),
]
ALLOWED: list[tuple[str, Any, str]] = [
    ("total-steps", 8, "--total-steps is now 8, it was 4"),
    ("lr", 1e-4, "--lr is now 0.0001, it was 0.001"),
    ("warmup-steps", 1, "--warmup-steps is now 1, it was 0"),
    ("checkpoint-steps", 4, "--checkpoint-steps is now 4, it was 2"),
    ("evaluation-steps", 2, "--evaluation-steps is now 2, it was 0"),
    ("weight-decay", 0.1, "--weight-decay is now 0.1, it was 0.01"),
    ("recompute", "false", "--recompute is now false, it was auto"),
    ("project-name", "another", "--project-name is now another, it was dist-clm-train"),
    ("dist-timeout", 7, "--dist-timeout is now 7.0, it was 300.0"),
]


@pytest.mark.parametrize(("flag", "value", "words"), REFUSED)
def test_what_may_not_change_is_an_error_that_names_both_values(
    flag: str, value: Any, words: tuple[str, ...], flags: dict[str, Any]
) -> None:
    folder = flags["checkpoint-path"].parent
    changed = value.format(folder=folder) if isinstance(value, str) else value
    with pytest.raises(ValueError) as error, patch.object(CheckpointStore, "verify") as verify:
        open_run(**run_parts({**flags, flag: changed}))
    verify.assert_not_called()  # verify() reads weights
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_is_older_than_a_flag_counts_as_with_the_default(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint without --deterministic was refused: False now, but "made with None"."""
    old = {**flags, "checkpoint-path": tmp_path / "old", "total-steps": 2}

    def without_the_flag(settings: Settings) -> dict[str, Any]:
        kept = fixed_flags(settings)
        del kept["--deterministic"]
        return kept

    with patch("training.checkpointing.fixed_flags", without_the_flag):
        train_alone(old)
    assert open_run(**run_parts(old)).step == 2
    with pytest.raises(ValueError, match=r"--deterministic is True, .* was made with False"):
        open_run(**run_parts({**old, "deterministic": "true"}))


@pytest.mark.parametrize(("flag", "value", "line"), ALLOWED)
def test_what_may_change_is_told_in_one_line(
    flag: str, value: Any, line: str, flags: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert open_run(**run_parts({**flags, flag: value})).step == STEPS
    assert [record.message for record in caplog.records] == [line]


def test_more_steps_go_on_with_the_schedule_computed_anew(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    """After a resume with more --total-steps, the schedule of learning rates has the new length."""
    longer = {**flags, "total-steps": 8, "checkpoint-path": tmp_path / "longer"}
    train_alone({**longer, "total-steps": STEPS})
    train_alone(longer)
    lines = read_metrics(tmp_path / "longer" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    rates = [line["lr"] for line in lines if line["lr"] is not None]
    assert rates == pytest.approx([1e-3, 0.5e-3, 0.5e-3, 0.25e-3])


@pytest.mark.parametrize("resumed", [False, True])
def test_held_out_text_that_predicts_nothing_is_told_before_training(
    resumed: bool, flags: dict[str, Any], tmp_path: Path
) -> None:
    """A held-out set without tokens to predict is an error before training, even after a resume."""
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    run = tmp_path / "run"
    if resumed:
        shutil.copytree(flags["checkpoint-path"], run)
    given = f"{flags['checkpoint-path'].parent / 'a.jsonl'},{empty}"
    again = {**flags, "checkpoint-path": run, "total-steps": 8, "evaluation-data": given}
    with pytest.raises(ValueError, match=f"^{empty}: the source yields nothing to evaluate$"):
        train_alone(again)
    assert len(read_metrics(run / "metrics.jsonl")) == (STEPS if resumed else 0)
    assert (run / "metrics.jsonl").exists() == resumed


def test_the_same_step_is_saved_over_one_that_never_was_whole(
    flags: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A resume warns of an incomplete checkpoint, saves it again, and deletes temporary files."""
    run = tmp_path / "run"
    again = {**flags, "checkpoint-path": run}
    train_alone(again)
    for path in (*(run / "4").glob("*.json"), run / "4" / "prank_0_optimizer.pt"):
        path.unlink()
    (run / f".latest.{'0' * 32}.tmp").write_bytes(b"")
    (run / ".partial-6-0000").mkdir()
    with caplog.at_level(logging.WARNING):
        train_alone(again)
    (warning,) = [record.message for record in caplog.records]
    assert warning.startswith("step 4 is not complete")
    assert warning.endswith("going back to step 2")
    assert (run / "4" / "config.json").is_file()
    assert (run / "latest").read_text() == "4"
    assert not list(run.glob(".*"))
