"""Tests what a run does if a loss, gradient or weight is inf or NaN; no update uses such values."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from comm.topology import Topology
from monitor.metrics import read_metrics
from tasks.packing.blocks import TokenBlock
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.cases import Case, Told, meet_at, run_folder, train_cases, weights_of
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import run_ranks
from tests.support.mixed import lines_of, model_flags
from tests.support.models import make_shards
from tests.support.poison import BadLogit, BadOutput, InfiniteLoss, Overflow

Trained = tuple[Path, list[dict[str, Told]]]  # the folder of all runs, each rank's log
LAYERS, TOKENS, STEPS, BAD_STEP, MAX_SKIPPED = 2, 16, 5, 3, 3
ROWS_OF_A_REPLICA = 4  # in two microbatches
HELD_OUT = 2  # batches
SKIPPED = "update skipped at loss scale 32768: the loss is not finite"
# The ranks of P=2 R=2: ranks 0 and 1 are stages 0 and 1 of replica 0, ranks 2 and 3 of replica 1.
FOLDER = "checkpoint.steps.folder"
PLACES = {"first-stage": BadOutput(2, BAD_STEP, 0), "last-stage": BadOutput(1, BAD_STEP, 1)}


@contextmanager
def gives_up_on_a_full_disk(topology: Topology) -> Iterator[None]:
    full = OSError(28, "No space left on device")
    with Overflow(1, range(3, 9))(topology), patch(f"{FOLDER}.write_stage_files", side_effect=full):
        yield


def flags(folder: Path) -> dict[str, Any]:
    return model_flags(folder) | flags_of(f"""
        --num-layers 1 --seq-length {TOKENS} --batch-size {ROWS_OF_A_REPLICA}
        --micro-batch-size 2 --recompute false --total-steps {STEPS}
        --checkpoint-steps {BAD_STEP - 1} --lr 2e-3 --lr-schedule constant
    """)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("not-finite")
    write_jsonl(folder / "a.jsonl", make_texts(200, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": LAYERS})
    own = flags(folder)
    fp16 = own | {"fp16": "true", "max-skipped-updates": MAX_SKIPPED, "hysteresis": 1}
    lazy = fp16 | {"checkpoint-steps": 0, "total-steps": 8}
    halves = {"gradient-accumulate-step": 2, "total-steps": 6}
    constant = {"loss-scale": 64, "min-loss-scale": 65536}
    held_out = own | {"evaluation-data": folder / "a.jsonl", "evaluation-num-batch": HELD_OUT}
    of_sets = held_out | {"evaluation-data": f"one={folder / 'a.jsonl'},two={folder / 'a.jsonl'}"}
    at_end = Overflow(1, range(STEPS + 1 - MAX_SKIPPED, STEPS + 1))
    cases = [
        Case("fp32-first-stage", own, PLACES["first-stage"], stops=True),
        Case("bf16-last-stage", own | {"bf16": "true"}, PLACES["last-stage"], stops=True),
        Case("gradient", own, Overflow(2, [BAD_STEP]), stops=True),
        Case("fp16-loss", fp16, BadLogit(1, BAD_STEP)),
        Case("fp16-all", fp16, PLACES["last-stage"]),
        Case("given-up", lazy, Overflow(1, range(3, 9)), stops=True),
        Case("given-up-unsaved", lazy, gives_up_on_a_full_disk, stops=True),
        Case("goes-on", lazy, after=("given-up-2-2", 5)),
        Case("half-an-update", fp16 | halves, InfiniteLoss(1, step=3)),
        Case("constant", fp16 | constant, Overflow(2, [BAD_STEP])),
        Case("to-dynamic", fp16 | {"initial-loss-scale": 1024}, after=("constant-2-2", 2)),
        Case("floor", fp16 | {"min-loss-scale": 16384}, Overflow(1, [2, 3])),
        Case("blown-up", fp16 | {"lr": "1e5", "checkpoint-steps": 1}, stops=True),
        Case("held-out", held_out, InfiniteLoss(3, calls=[2 * HELD_OUT - 1])),
        Case("held-out-sets", of_sets, InfiniteLoss(3, calls=[3 * HELD_OUT + 1])),
        Case("bad-loss", fp16 | {"max-skipped-updates": 1}, PLACES["last-stage"], stops=True),
        Case("at-end", fp16, at_end, stops=True),
        Case("at-end-again", fp16, after=("at-end-2-2", STEPS), stops=True),
        Case("at-end-longer", fp16 | {"total-steps": STEPS + 1}, after=("at-end-2-2", STEPS)),
    ]
    told = run_ranks(4, train_cases, meet_at([(2, 2)]), cases, folder, deadline=300.0)
    return folder, told


def ends_of(trained: Trained, run: str) -> list[str]:
    """Returns the error with which each rank stopped."""
    return [told[f"{run}-2-2"].stopped or "" for told in trained[1]]


def skips_of(trained: Trained, run: str) -> list[str]:
    return [line for line in trained[1][0][f"{run}-2-2"].lines if "skipped" in line]


def blocks_of(folder: Path, step: int) -> list[TokenBlock]:
    """Returns the blocks of all replicas in one step."""
    spec = SourceSpec(str(folder / "a.jsonl"))
    stream = open_training_stream([spec], tokenizer(), seq_len=TOKENS, seed=42)
    blocks = iter(stream.next_block, None)
    rows = 2 * ROWS_OF_A_REPLICA
    return list(islice(blocks, (step - 1) * rows, step * rows))


def documents_of(folder: Path, step: int, rows: Sequence[int]) -> str:
    """Returns the names of the documents in these rows, in the format of the error messages."""
    blocks = blocks_of(folder, step)
    return "; ".join(", ".join(blocks[row].documents) for row in rows)


@pytest.mark.parametrize(
    ("run", "stage", "rows"), [("fp32-first-stage", 0, (4, 5)), ("bf16-last-stage", 1, (2, 3))]
)
def test_a_loss_that_is_not_finite_stops_every_rank(
    run: str, stage: int, rows: tuple[int, int], trained: Trained
) -> None:
    """The error of every rank names step, stage, and the documents of the bad microbatch."""
    folder = trained[0]
    blocks, named = blocks_of(folder, BAD_STEP), documents_of(folder, BAD_STEP, rows)
    expected = (
        f"step {BAD_STEP}: the loss is not finite, first in stage {stage}, on the blocks from "
        f"{named}; nothing was updated"
    )
    assert all(stopped.startswith(expected) for stopped in ends_of(trained, run))
    nothing_trained_after(folder, run, BAD_STEP - 1)
    for row in rows:  # each text begins with its number, from 0
        text = tokenizer().decode(blocks[row].token_ids)
        for number in re.findall(r"\b1-(\d+) ", text):
            assert f"{folder / 'a.jsonl'}:{int(number) + 1}" in named


def nothing_trained_after(folder: Path, run: str, step: int) -> None:
    path = run_folder(folder, run, 2, 2)
    steps = [line["step"] for line in read_metrics(path / "metrics.jsonl")]
    assert steps == list(range(1, step + 1))
    assert (path / "latest").read_text() == str(step)
    assert not (path / str(step + 1)).exists()


def test_a_gradient_that_is_not_finite_stops_every_rank(trained: Trained) -> None:
    folder = trained[0]
    where = "stage 0, layer 0, post_attention_layernorm.weight"
    expected = f"step {BAD_STEP}: the gradient of {where} is not finite; nothing was updated"
    assert all(stopped.startswith(expected) for stopped in ends_of(trained, "gradient"))
    nothing_trained_after(folder, "gradient", BAD_STEP - 1)


@pytest.mark.parametrize("run", ["fp16-loss", "fp16-all"])
def test_in_fp16_such_a_loss_costs_one_update(run: str, trained: Trained) -> None:
    """In fp16, a loss that is not finite is null in the metrics, and its update is skipped.

    A logit of -inf makes only the loss infinite; the update is skipped although the gradients are
    finite. If the gradients are not finite either, the log line still gives the loss as the reason.
    """
    folder = trained[0]
    lines = lines_of(folder, run, 2, 2)
    assert [line["loss"] is None for line in lines] == [n == BAD_STEP for n in range(1, STEPS + 1)]
    assert [line["grad_norm"] is None for line in lines] == [line["loss"] is None for line in lines]
    assert lines[BAD_STEP]["loss_scale"] == lines[BAD_STEP - 1]["loss_scale"] / 2
    assert skips_of(trained, run) == [f"step {BAD_STEP}: {SKIPPED}"]


def test_too_many_skips_in_a_row_end_the_run_with_a_checkpoint(trained: Trained) -> None:
    folder = trained[0]
    last = 2 + MAX_SKIPPED
    for stopped in ends_of(trained, "given-up"):
        assert stopped.startswith(f"step {last}: {MAX_SKIPPED} updates in a row were skipped")
        assert "--max-skipped-updates" in stopped
        why = "stage 1, layer 1, post_attention_layernorm.bias has a gradient that is not finite"
        assert f"the last one because {why}; the weights" in stopped
    assert (run_folder(folder, "given-up", 2, 2) / "latest").read_text() == str(last)
    assert weights_of(folder, "given-up", 2, 2) == weights_of(folder, "fp16-loss", 2, 2, step=2)


def test_a_failing_save_does_not_hide_that_the_run_gave_up(trained: Trained) -> None:
    folder = trained[0]
    last = 2 + MAX_SKIPPED
    for stopped in ends_of(trained, "given-up-unsaved"):
        assert stopped.startswith(f"step {last}: {MAX_SKIPPED} updates in a row were skipped")
        assert f"but step {last} is not saved: rank 0 on " in stopped
        assert "No space left on device" in stopped
    assert not (run_folder(folder, "given-up-unsaved", 2, 2) / "latest").exists()


def test_a_run_that_gave_up_goes_on(trained: Trained) -> None:
    lines = lines_of(trained[0], "goes-on", 2, 2)
    assert len(lines) == 8
    assert [line["grad_norm"] is None for line in lines] == [2 <= n < 5 for n in range(8)]
    scales = [32768.0] * 3 + [16384.0, 8192.0] + [4096.0] * 3
    assert [line["loss_scale"] for line in lines] == scales


def test_a_loss_in_the_first_half_of_an_update_costs_all_of_it(trained: Trained) -> None:
    """An update of two iterations is skipped even if only the first iteration has a loss of inf."""
    folder = trained[0]
    lines = lines_of(folder, "half-an-update", 2, 2)
    assert [line["loss"] is None for line in lines] == [n == 3 for n in range(1, 7)]
    assert [line["grad_norm"] is None for line in lines] == [True, False, True, True, True, False]
    assert skips_of(trained, "half-an-update") == [f"step 4: {SKIPPED}"]


def test_a_constant_scale_stays_through_an_overflow(trained: Trained) -> None:
    """An overflow does not change a constant loss scale, even if --min-loss-scale is larger."""
    lines = lines_of(trained[0], "constant", 2, 2)
    assert [line["loss_scale"] for line in lines] == [64.0] * STEPS
    assert [line["grad_norm"] is None for line in lines] == [n == 3 for n in range(1, STEPS + 1)]


def test_a_run_may_go_on_with_a_dynamic_scale(trained: Trained) -> None:
    folder, told = trained
    scales = [line["loss_scale"] for line in lines_of(folder, "to-dynamic", 2, 2)]
    assert scales == [64.0] * 2 + [1024.0] * 3
    for one in told:
        lines = one["to-dynamic-2-2"].lines
        assert "--loss-scale is now 0.0, it was 64.0" in lines
        said = (
            "the saved loss scale was constant, 64: the dynamic loss scale starts at "
            "--initial-loss-scale 1024"
        )
        assert said in lines


def test_a_scale_halves_down_to_the_smallest(trained: Trained) -> None:
    scales = [line["loss_scale"] for line in lines_of(trained[0], "floor", 2, 2)]
    assert scales == [32768.0] * 2 + [16384.0] * 3


def test_weights_that_are_not_finite_are_not_saved(trained: Trained) -> None:
    """If an update with --lr 1e5 makes weights that do not fit fp16, no checkpoint is saved."""
    folder = trained[0]
    for stopped in ends_of(trained, "blown-up"):
        assert stopped.startswith(
            "step 1: stage 0, embedding, embed_in.weight or its optimizer state is no longer finite"
        )
        assert "not saved" in stopped
    path = run_folder(folder, "blown-up", 2, 2)
    assert len(read_metrics(path / "metrics.jsonl")) == 1
    assert not (path / "latest").exists()
    assert not (path / "1").exists()


def test_a_held_out_loss_that_is_not_finite_loses_nothing(trained: Trained) -> None:
    """If a held-out loss is not finite, the metrics show null, and the run goes on and is saved."""
    folder, told = trained
    path = run_folder(folder, "held-out", 2, 2)
    assert (path / "latest").read_text() == str(STEPS)
    first, *_, last = read_metrics(path / "metrics.jsonl")
    assert first["eval_loss_before"] > 0
    assert (last["eval_loss"], last["eval_perplexity"]) == (None, None)
    # The second batch has blocks 9 to 16; the second replica's second microbatch has the last two.
    said = [line for line in told[0]["held-out-2-2"].lines if "held-out loss is not" in line]
    assert len(said) == 1
    assert said[0].endswith(": 15, 16")


def test_a_set_whose_loss_is_not_finite_is_named(trained: Trained) -> None:
    """If one held-out set's loss is inf, this loss and the loss over both sets are null."""
    folder, told = trained
    path = run_folder(folder, "held-out-sets", 2, 2)
    first, *_, last = read_metrics(path / "metrics.jsonl")
    assert first["eval_sets_before"]["one"] == first["eval_sets_before"]["two"]
    assert last["eval_loss"] is None
    one, two = last["eval_sets"]["one"], last["eval_sets"]["two"]
    assert 0 < one["loss"] < first["eval_sets_before"]["one"]["loss"]
    assert two == {"loss": None, "perplexity": None, "tokens": one["tokens"]}
    for rank in told:  # ranks without data know the sets, too
        (said,) = [line for line in rank["held-out-sets-2-2"].lines if "held-out loss" in line]
        assert said.startswith("the held-out loss of two is not finite")
        assert "--evaluation-data, set two" in said
        assert said.endswith(": 15, 16")


def test_giving_up_names_the_blocks_of_a_bad_loss(trained: Trained) -> None:
    folder = trained[0]
    named = documents_of(folder, BAD_STEP, (2, 3))
    why = f"the loss is not finite, first in stage 1, on the blocks from {named}"
    for stopped in ends_of(trained, "bad-loss"):
        assert f"the last one because {why}; the weights" in stopped


def test_a_run_that_gave_up_at_its_end_is_no_success_when_started_again(trained: Trained) -> None:
    """A run that skipped too many updates at its end resumes only with a larger --total-steps."""
    folder = trained[0]
    for stopped in ends_of(trained, "at-end"):
        assert stopped.startswith(f"step {STEPS}: {MAX_SKIPPED} updates")
    for stopped in ends_of(trained, "at-end-again"):
        assert stopped.startswith(f"the run gave up at its last step, {STEPS}")
    lines = lines_of(folder, "at-end-longer", 2, 2)
    assert [line["grad_norm"] is None for line in lines] == [False] * 2 + [True] * 3 + [False]
    latest = run_folder(folder, "at-end-longer", 2, 2) / str(STEPS + 1) / "meta.json"
    assert json.loads(latest.read_text())["gave_up"] is False
