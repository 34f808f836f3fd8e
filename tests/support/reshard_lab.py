"""Runs of many shapes (P, R), and other runs that resume from them in each of these shapes.

Dropout is on, because its masks depend on the layer's number in the model: if a stage counts its
layers wrongly after a change of shape, the losses differ.
"""

import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tests.support.cases import Case, Told, meet_at, run_folder, train_cases
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.kill_lab import numbers
from tests.support.launcher import run_ranks
from tests.support.mixed import model_flags, rows_of_a_replica
from tests.support.models import make_shards
from tests.support.parity import worst

Shape = tuple[int, int]
LAYERS, STEPS, SAVED = 5, 4, 2
LISTS = {1: "5", 2: "4,1", 4: "1,2,1,1"}
SHAPES: list[Shape] = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
PAIRS = list(product(SHAPES, SHAPES))
KINDS = list(product(("fp32", "bf16"), ("adam", "8bit-adam")))
Turn = tuple[tuple[int, int, str], list[Case]]


def layers_of(stages: int, _replicas: int) -> str:
    return LISTS[stages]


def flags(folder: Path, kind: tuple[str, str], **changes: object) -> dict[str, Any]:
    """Returns the flags of a run of `kind` (precision, optimizer), for any shape."""
    precision, optimizer = kind
    return {
        **model_flags(folder),
        **flags_of(f"""
            --seq-length 16 --micro-batch-size 2 --recompute false --total-steps {STEPS}
            --checkpoint-steps {SAVED} --lr 2e-3 --weight-decay 0.1 --optimizer {optimizer}
            --fp16 {precision == "fp16"} --bf16 {precision == "bf16"}
        """),
        "num-layers": layers_of,
        "batch-size": rows_of_a_replica,
        **changes,
    }


def resumed_name(kind: tuple[str, str], source: Shape) -> str:
    return f"{'-'.join(kind)}-from-{source[0]}-{source[1]}"


def resumed(
    folder: Path, kind: tuple[str, str], pairs: Sequence[tuple[Shape, Shape]], **changes: object
) -> list[Case]:
    """Returns a run per pair (source, target); it has shape `target` and resumes `source`'s run."""
    return [
        Case(
            resumed_name(kind, source),
            flags(folder, kind, **changes),
            after=(f"{'-'.join(kind)}-{source[0]}-{source[1]}", SAVED),
            shapes=[target],
        )
        for source, target in pairs
    ]


def train_in_turn(
    rank: int, _world_size: int, url: str, turns: Sequence[Turn], folder: Path
) -> dict[str, Told]:
    """Trains the cases of one turn after another; a turn of n ranks uses the first n processes."""
    told: dict[str, Told] = {}
    for number, (shape, cases) in enumerate(turns):
        begun = folder / f"turn-{number}"
        if rank == 0:
            begun.touch()
        if rank < shape[0] * shape[1]:
            while not begun.exists():
                time.sleep(0.02)
            told |= train_cases(rank, shape[0] * shape[1], url, [shape], cases, folder)
    return told


def train_all(
    folder: Path, whole: list[Case], others: list[Case], *, deadline: float
) -> dict[str, Told]:
    """Trains the cases `whole`, then `others`, which resume from them; returns rank 0's logs."""
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    changes = {"num_hidden_layers": LAYERS, "intermediate_size": 128}  # enough for 8-bit moments
    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    make_shards(folder, "model", "gptneox", changes | dropout)
    turns: list[Turn] = [
        (meet_at([shape])[0], cases)
        for cases in (whole, others)
        for shape in SHAPES
        if any(case.shapes is None or shape in case.shapes for case in cases)
    ]
    told: dict[str, Told] = run_ranks(8, train_in_turn, turns, folder, deadline=deadline)[0]
    return told


def check_resumed(
    folder: Path, kind: tuple[str, str], source: Shape, target: Shape, *, steps: int = STEPS
) -> float:
    """Compares a resumed run with its source; returns the largest relative loss difference."""
    stayed = numbers(run_folder(folder, "-".join(kind), *source))
    moved = numbers(run_folder(folder, resumed_name(kind, source), *target))
    assert [line["step"] for line in moved] == list(range(1, steps + 1))
    assert moved[:SAVED] == stayed[:SAVED]
    for key in ("lr", "tokens", "loss_scale"):
        assert [line.get(key) for line in moved] == [line.get(key) for line in stayed]
    if source == target:
        assert moved == stayed
    return worst([line["loss"] for line in moved], [line["loss"] for line in stayed])
