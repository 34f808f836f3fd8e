import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from monitor.console import Console
from monitor.metrics import HeldOut, IterationMetrics, MetricsFile, SetLoss, StepWork, read_metrics
from monitor.progress import Progress
from monitor.recorder import FileRecorder
from monitor.wandb_run import WandbRun
from tests.support.full_disk import files_no_larger_than

REQUIRED = ["step", "loss", "lr", "grad_norm", "tokens", "tokens_processed", "step_seconds"]
REQUIRED += ["tokens_per_second", "tflops"]
WORK = StepWork(num_tokens=160, device_flops=2e13, peak_flops=None)


def line(step: int, **changes: float | bool | HeldOut | StepWork | None) -> IterationMetrics:
    values: dict[str, Any] = {"loss": 2.0, "lr": 1e-3, "grad_norm": 0.5, "step_seconds": 0.5}
    values |= {"num_trained_tokens": 100, "work": WORK}
    return IterationMetrics(step=step, **{**values, **changes})


@pytest.fixture
def metrics_file(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.jsonl")


def test_a_plain_line_has_exactly_the_keys_that_every_line_has() -> None:
    assert list(line(1).to_json()) == REQUIRED


def test_the_rates_are_those_of_all_processed_tokens() -> None:
    """The rate was that of the trained tokens, which says little about speed if many are masked."""
    written = line(1).to_json()
    assert (written["tokens"], written["tokens_processed"]) == (100, 160)
    assert (written["tokens_per_second"], written["tflops"]) == (320.0, 40.0)


def test_utilization_is_the_share_of_the_device_s_peak() -> None:
    known = replace(WORK, peak_flops=312e12)
    assert line(1, work=known).to_json()["mfu"] == pytest.approx(40 / 312)
    no_time = line(1, work=known, step_seconds=0.0).to_json()
    assert no_time["mfu"] is no_time["tflops"] is no_time["tokens_per_second"] is None


def test_an_iteration_that_ended_no_update_has_nulls() -> None:
    written = line(1, lr=None, grad_norm=None).to_json()
    assert list(written) == REQUIRED
    assert written["lr"] is written["grad_norm"] is None


def test_optional_keys_appear_where_they_say_something() -> None:
    held_out = {"held_out": HeldOut(math.log(7)), "held_out_before": HeldOut(3.0)}
    written = line(1, loss_scale=8.0, resumed=True, **held_out).to_json()
    optional = ["loss_scale", "eval_loss", "eval_perplexity", "eval_loss_before", "resumed"]
    assert list(written) == REQUIRED + optional
    assert written["eval_perplexity"] == pytest.approx(7)
    assert written["resumed"] is True


def test_each_set_of_an_evaluation_has_its_numbers(metrics_file: MetricsFile) -> None:
    """A line has loss and perplexity of each evaluation set; null stands for NaN or infinity."""
    before = HeldOut(2.5, {"wiki": SetLoss(3.0, 10), "a/b c": SetLoss(1e6, 10)})
    after = HeldOut(math.nan, {"wiki": SetLoss(0.0, 10), "a/b c": SetLoss(math.nan, 5)})
    metrics_file.append(line(1, held_out=after, held_out_before=before))
    written = json.loads(metrics_file.path.read_text())
    assert {key: value for key, value in written.items() if key.startswith("eval")} == {
        "eval_loss": None,
        "eval_perplexity": None,
        "eval_sets": {
            "wiki": {"loss": 0.0, "perplexity": 1.0, "tokens": 10},
            "a/b c": {"loss": None, "perplexity": None, "tokens": 5},
        },
        "eval_loss_before": 2.5,
        "eval_sets_before": {
            "wiki": {"loss": 3.0, "perplexity": math.exp(3.0), "tokens": 10},
            "a/b c": {"loss": 1e6, "perplexity": None, "tokens": 10},
        },
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_written_as_null(metrics_file: MetricsFile, value: float) -> None:
    metrics_file.append(line(1, loss=value, grad_norm=value, held_out=HeldOut(1e6)))
    text = metrics_file.path.read_text()
    assert json.loads(text)["loss"] is None
    assert json.loads(text)["eval_perplexity"] is None
    assert "NaN" not in text
    assert "Infinity" not in text


def test_a_start_without_a_checkpoint_and_a_resume_without_the_file_begin_one(
    metrics_file: MetricsFile,
) -> None:
    metrics_file.append(line(1))
    metrics_file.clear()
    assert metrics_file.path.read_text() == ""
    metrics_file.path.unlink()
    metrics_file.cut_after(3)
    assert metrics_file.path.read_text() == ""


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}'])
def test_a_resume_cuts_later_and_torn_lines(metrics_file: MetricsFile, torn: str) -> None:
    for step in range(1, 6):
        metrics_file.append(line(step, loss=1 / step))
    whole = metrics_file.path.read_text().splitlines(keepends=True)
    metrics_file.path.write_text("".join(whole) + torn)
    metrics_file.cut_after(3)
    assert metrics_file.path.read_text() == "".join(whole[:3])
    assert [one["loss"] for one in read_metrics(metrics_file.path)] == [1, 1 / 2, 1 / 3]
    assert [path.name for path in metrics_file.path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_torn_line_up_to_the_resumed_step_does_not_spoil_the_next(
    metrics_file: MetricsFile,
) -> None:
    metrics_file.append(line(1))
    with metrics_file.path.open("a") as file:
        file.write('{"step": 2, "los')
    metrics_file.cut_after(2)
    metrics_file.append(line(2, resumed=True))
    assert [entry["step"] for entry in read_metrics(metrics_file.path)] == [1, 2]


def test_a_line_that_the_disk_takes_half_of_is_not_there(metrics_file: MetricsFile) -> None:
    """If only part of a line fits on disk, that part is removed, and later lines are complete."""
    metrics_file.append(line(1))
    size = metrics_file.path.stat().st_size
    with files_no_larger_than(size + 20), pytest.raises(OSError, match=r"metrics\.jsonl"):
        metrics_file.append(line(2))
    assert metrics_file.path.stat().st_size == size
    metrics_file.append(line(2), line(3))
    assert [one["step"] for one in read_metrics(metrics_file.path)] == [1, 2, 3]


def test_lines_that_the_disk_does_not_take_wait_for_it(
    metrics_file: MetricsFile, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk is reported once; the missing lines are written when the disk has space again."""
    folder = metrics_file.path.parent
    progress = Progress(9, Console(io.StringIO()))
    recorder = FileRecorder(folder, metrics_file, progress, WandbRun())
    recorder.log_iteration(line(1))
    with files_no_larger_than(metrics_file.path.stat().st_size):
        recorder.log_iteration(line(2))
        recorder.log_iteration(line(3))
    assert [one["step"] for one in read_metrics(metrics_file.path)] == [1]
    recorder.log_iteration(line(4))
    assert [one["step"] for one in read_metrics(metrics_file.path)] == [1, 2, 3, 4]
    (warning,) = [record.message for record in caplog.records]
    assert "cannot write" in warning
