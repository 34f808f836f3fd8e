"""Numbers that are not finite: what stops a run and what it says; nothing is trained on them."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from monitor.metrics import read_metrics
from tasks.build import open_training_stream
from tasks.packing import Block
from tasks.registry import SourceSpec
from tests.dist import run_ranks
from tests.poison import BadOutput, Overflow
from tests.runs import Case, Told, meet_at, run_folder, train_cases
from tests.tasks.material import make_texts, tokenizer, write_jsonl
from tests.test_mixed_precision import lines_of, model_flags, weights_of
from tests.test_parity import make_shards

LAYERS, TOKENS, STEPS, BAD_STEP, MAX_SKIPPED = 4, 16, 5, 3, 3
ROWS_OF_A_REPLICA = 4  # in two microbatches
# The ranks of P=2 R=2 by number: stage 0 and 1 of replica 0, stage 0 and 1 of replica 1.
PLACES = {"first-stage": BadOutput(2, BAD_STEP, 0), "last-stage": BadOutput(1, BAD_STEP, 1)}


def flags(folder: Path) -> dict[str, Any]:
    return {
        **model_flags(folder),
        "seq-length": TOKENS,
        "batch-size": ROWS_OF_A_REPLICA,
        "micro-batch-size": 2,
        "recompute": "false",
        "total-steps": STEPS,
        "checkpoint-steps": 1,
        "lr": 2e-3,
        "lr-schedule": "constant",
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Told]]]:
    """All runs, and what each rank told in them."""
    folder = tmp_path_factory.mktemp("not-finite")
    write_jsonl(folder / "a.jsonl", make_texts(200, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": LAYERS})
    own = flags(folder)
    cases = [
        Case(f"{precision}-{place}", own | {precision: "true"} if precision == "bf16" else own,
             hook, stops=True)
        for precision in ("fp32", "bf16") for place, hook in PLACES.items()
    ]  # fmt: skip
    cases.append(Case("gradient", own, Overflow(2, [BAD_STEP]), stops=True))
    fp16 = own | {"fp16": "true", "max-skipped-updates": MAX_SKIPPED, "hysteresis": 1}
    cases.append(Case("fp16-loss", fp16, PLACES["last-stage"]))
    lazy = fp16 | {"checkpoint-steps": 0, "total-steps": 8}
    cases.append(Case("given-up", lazy, Overflow(1, range(3, 9)), stops=True))
    cases.append(Case("goes-on", lazy, after=("given-up-2-2", 5)))
    told = run_ranks(4, train_cases, meet_at([(2, 2)]), cases, folder, deadline=300.0)
    return folder, told


def blocks_of(folder: Path, step: int) -> list[Block]:
    """Those of all replicas in one step."""
    spec = SourceSpec(str(folder / "a.jsonl"))
    stream = open_training_stream([spec], tokenizer(), seq_length=TOKENS, seed=42)
    blocks = iter(stream.next_block, None)
    rows = 2 * ROWS_OF_A_REPLICA
    return list(islice(blocks, (step - 1) * rows, step * rows))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("place", "stage", "rows"), [("first-stage", 0, (4, 5)), ("last-stage", 1, (2, 3))]
)
def test_a_loss_that_is_not_finite_stops_every_rank(
    precision: str, place: str, stage: int, rows: tuple[int, int],
    trained: tuple[Path, list[dict[str, Told]]],
) -> None:  # fmt: skip
    """Step, stage, and where the very blocks of that replica and microbatch are from."""
    folder, told = trained
    run = f"{precision}-{place}"
    blocks = blocks_of(folder, BAD_STEP)
    named = "; ".join(", ".join(blocks[row].documents) for row in rows)
    expected = (
        f"step {BAD_STEP}: the loss is not finite, first in stage {stage}, on the blocks from "
        f"{named}; nothing was updated"
    )
    for one in told:
        stopped = one[f"{run}-2-2"].stopped
        assert stopped is not None
        assert stopped.startswith(expected)
    nothing_trained_after(folder, run, BAD_STEP - 1)
    for row in rows:  # the texts begin with their number, from 0
        text = tokenizer().decode(blocks[row].tokens)
        for number in re.findall(r"\b1-(\d+) ", text):
            assert f"{folder / 'a.jsonl'}:{int(number) + 1}" in named


def nothing_trained_after(folder: Path, run: str, step: int) -> None:
    path = run_folder(folder, run, 2, 2)
    assert [line["step"] for line in read_metrics(path / "metrics.jsonl")] == list(
        range(1, step + 1)
    )
    assert (path / "latest").read_text() == str(step)
    assert not (path / str(step + 1)).exists()


def test_a_gradient_that_is_not_finite_stops_every_rank(
    trained: tuple[Path, list[dict[str, Told]]],
) -> None:
    folder, told = trained
    where = "stage 0, layer 0, post_attention_layernorm.weight"
    expected = f"step {BAD_STEP}: the gradient of {where} is not finite; nothing was updated"
    assert all((one["gradient-2-2"].stopped or "").startswith(expected) for one in told)
    nothing_trained_after(folder, "gradient", BAD_STEP - 1)


def test_in_fp16_such_a_loss_costs_one_update(
    trained: tuple[Path, list[dict[str, Told]]],
) -> None:
    """No reason to stop, even where gradients are finite: a logit of -inf has such.

    And JSON has no NaN.
    """
    folder, told = trained
    lines = lines_of(folder, "fp16-loss", 2, 2)
    assert [line["loss"] is None for line in lines] == [n == BAD_STEP for n in range(1, STEPS + 1)]
    assert [line["grad_norm"] is None for line in lines] == [line["loss"] is None for line in lines]
    assert lines[BAD_STEP]["loss_scale"] == lines[BAD_STEP - 1]["loss_scale"] / 2
    skips = [line for line in told[0]["fp16-loss-2-2"].lines if "skipped" in line]
    assert skips == [f"step {BAD_STEP}: update skipped at loss scale 32768: the loss is not finite"]


def test_too_many_skips_in_a_row_end_the_run_with_a_checkpoint(
    trained: tuple[Path, list[dict[str, Told]]],
) -> None:
    folder, told = trained
    last = 2 + MAX_SKIPPED
    for one in told:
        stopped = one["given-up-2-2"].stopped
        assert stopped is not None
        assert stopped.startswith(f"step {last}: {MAX_SKIPPED} updates in a row were skipped")
        assert "--max-skipped-updates" in stopped
    assert (run_folder(folder, "given-up", 2, 2) / "latest").read_text() == str(last)
    assert weights_of(folder, "given-up", 2, 2) == weights_of(folder, "fp16-loss", 2, 2, step=2)


def test_a_run_that_gave_up_goes_on(trained: tuple[Path, list[dict[str, Told]]]) -> None:
    folder, _ = trained
    lines = lines_of(folder, "goes-on", 2, 2)
    assert len(lines) == 8
    assert [line["grad_norm"] is None for line in lines] == [2 <= n < 5 for n in range(8)]
    assert [line["loss_scale"] for line in lines] == [32768.0] * 3 + [16384.0, 8192.0] + [
        4096.0
    ] * 3
