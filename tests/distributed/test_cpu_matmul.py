"""Tests --cpu-matmul: how each rank chooses its matmul library, logs it, and keeps it in a resume.

The tests replace the description of the machine's CPU by descriptions of other CPUs. Whatever the
description says, torch can use oneDNN only if the machine has AVX-512; otherwise torch uses its
default library.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import modules.matmul.select
from checkpoint.steps.meta import read_meta
from comm.backends.single_process import SingleProcessCommunicator
from comm.topology import Topology
from modules.matmul.backend import Matmul, use_matmul
from modules.matmul.cpu_info import CpuInfo
from modules.matmul.select import saved_choice
from tests.support.cases import Case, Told, curve, meet_at, run_folder, train_cases
from tests.support.cpus import CPUS
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import run_ranks
from tests.support.mixed import model_flags
from tests.support.models import make_shards
from training.cpu_matmul import choose_cpu_matmul
from training.trainer import Trainer

Runs = tuple[Path, list[dict[str, Told]]]  # their folder, and each rank's log lines
STEPS, SAVED = 4, 2
TOLERANCE = 1e-5  # relative, of losses; both libraries multiply in fp32
EPYC, XEON, OLD = "AMD EPYC 9654 96-Core Processor", CPUS["Ice Lake"].name, "Zen 3"

# ---- a world of one ----


@pytest.fixture(autouse=True)
def _torchs_default() -> Iterator[None]:
    yield
    use_matmul("default")


def settle(flag: str, kind: str, saved: Matmul | None = None, precision: str = "fp32") -> str:
    (choice,) = choose_cpu_matmul(
        flag,
        precision=precision,
        saved=None if saved is None else [saved],
        control=SingleProcessCommunicator(),
        cpu=CPUS[kind],
    )
    return choice


def setting() -> str:
    mkldnn: Any = torch.backends.mkldnn
    return str(mkldnn.matmul.fp32_precision)


# flag, CPU, choice in the checkpoint: the new choice, and the line logged before the choice
DECISIONS: list[tuple[str, str, Matmul | None, str, str | None]] = [
    ("auto", "Zen 4", None, "onednn", None),
    ("auto", "Zen 3", None, "default", None),
    ("auto", "Sapphire Rapids", None, "default", None),
    ("default", "Zen 4", None, "default", None),
    ("onednn", "Ice Lake", None, "onednn", None),
    ("onednn", "Zen 3", None, "default", "--cpu-matmul onednn: oneDNN fp32 matmul needs AVX-512"),
    ("auto", "Zen 4", "default", "default", None),
    ("auto", "Ice Lake", "onednn", "onednn", None),
    ("auto", "Zen 3", "onednn", "default", "the checkpoint was made with oneDNN: oneDNN"),
    ("default", "Zen 4", "onednn", "default", "--cpu-matmul is now default, it was onednn"),
    ("onednn", "Zen 4", "default", "onednn", "--cpu-matmul is now onednn, it was default"),
    ("onednn", "Zen 4", "onednn", "onednn", None),
]


@pytest.mark.parametrize(("flag", "kind", "saved", "choice", "told"), DECISIONS)
def test_flag_checkpoint_and_cpu_decide(
    flag: str,
    kind: str,
    saved: Matmul | None,
    choice: str,
    told: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modules.matmul.select, "fp32_error", lambda: 0.5)
    with caplog.at_level(logging.INFO):
        assert settle(flag, kind, saved) == choice
    assert setting() == {"default": "ieee", "onednn": "bf16"}[choice]
    *before, line = caplog.messages
    words = {"default": "torch's default", "onednn": "oneDNN"}[choice]
    assert line == f"CPU matmul: {words} ({CPUS[kind].name})"
    assert [text.startswith(told or "nothing") for text in before] == [True] * (told is not None)


def test_products_that_are_not_fp32_are_an_error_where_they_were_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(modules.matmul.select, "fp32_error", lambda: 85.2)
    words = r"^--cpu-matmul onednn: .*8480.* has 85 times the error that fp32 "
    with pytest.raises(ValueError, match=words):
        settle("onednn", "Sapphire Rapids")
    assert setting() == "ieee"


@pytest.mark.parametrize(("kind", "saved"), [("Zen 4", None), ("Sapphire Rapids", "onednn")])
def test_products_that_are_not_fp32_are_left_where_nobody_asked(
    kind: str,
    saved: Matmul | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(modules.matmul.select, "fp32_error", lambda: 85.2)
    assert settle("auto", kind, saved) == "default"
    assert setting() == "ieee"
    (warning,) = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert "has 85 times the error that fp32 rounding allows; using torch" in warning


@pytest.mark.parametrize("saved", [None, []])
def test_a_checkpoint_that_does_not_tell_leaves_it_to_the_cpu(saved: list[Matmul] | None) -> None:
    """A rank's CPU decides if the checkpoint is of a GPU run, or of a run that had no such rank."""
    assert saved_choice(saved, 0) is None


HALF = [
    ("Zen 3", "bf16", "bf16: the CPU has no matmul instructions", "slower than fp32"),
    ("Zen 4", "bf16", "bf16: the CPU has matmul instructions", "faster than fp32"),
    ("Zen 4", "fp16", "fp16: the CPU has no matmul instructions", "slower than fp32"),
    ("Sapphire Rapids", "fp16", "fp16: the CPU has matmul instructions", "faster than fp32"),
]


@pytest.mark.parametrize(("kind", "precision", "start", "end"), HALF)
def test_half_precision_is_told_in_one_line(
    kind: str, precision: str, start: str, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        settle("default", kind, precision=precision)
    _, line = caplog.messages
    assert line.startswith(start)
    assert line.endswith(end)


# ---- complete runs of two stages ----


@dataclass(frozen=True)
class Machines:
    """Hook: rank i takes the CPU `kinds[i]` for its own, and logs torch's matmul setting."""

    kinds: tuple[str, str]

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        # oneDNN reads this at its first use. A machine with AMX then computes as one without AMX.
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        run, mine = Trainer.run, CPUS[self.kinds[topology.rank]]

        def logged(loop: Trainer, start: int) -> None:
            logging.getLogger(__name__).info("trains with %s", setting())
            run(loop, start)

        with (
            patch.object(CpuInfo, "of_this_machine", lambda: mine),
            patch.object(Trainer, "run", logged),
        ):
            yield


BOTH, MIXED, SWAPPED = ("Zen 4", "Zen 4"), ("Zen 4", "Ice Lake"), ("Ice Lake", "Zen 4")
# name: flag, CPUs, the run from which it resumes; the matmul libraries of the ranks
RUNS: dict[str, tuple[str, tuple[str, str], str | None, list[str]]] = {
    "default": ("default", BOTH, None, ["default", "default"]),
    "onednn": ("onednn", BOTH, None, ["onednn", "onednn"]),
    "again": ("onednn", BOTH, None, ["onednn", "onednn"]),
    "resumed": ("auto", BOTH, "onednn", ["onednn", "onednn"]),
    "default-resumed": ("auto", BOTH, "default", ["default", "default"]),
    "mixed": ("auto", MIXED, None, ["onednn", "default"]),
    "mixed-resumed": ("auto", SWAPPED, "mixed", ["onednn", "default"]),
    "moved": ("auto", ("Zen 4", OLD), "onednn", ["onednn", "default"]),
    "asked": ("default", BOTH, "onednn", ["default", "default"]),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trains each run in RUNS; returns the folder of all runs, and each rank's log."""
    path = tmp_path_factory.mktemp("matmul")
    write_jsonl(path / "a.jsonl", make_texts(60, seed=1))
    make_shards(path, "model", "gptneox", {"num_hidden_layers": 2})
    same = model_flags(path) | flags_of(f"""
        --num-layers 1 --seq-length 16 --batch-size 4 --total-steps {STEPS}
        --checkpoint-steps {SAVED} --lr 2e-3
    """)
    cases = []
    for name, (flag, kinds, whole, _) in RUNS.items():
        after = None if whole is None else (f"{whole}-2-1", SAVED)
        cases.append(Case(name, {**same, "cpu-matmul": flag}, Machines(kinds), after))
    return path, run_ranks(2, train_cases, meet_at([(2, 1)]), cases, path, deadline=200.0)


@pytest.mark.parametrize("name", RUNS)
def test_each_rank_trains_with_its_choice_and_the_checkpoint_keeps_it(
    name: str, runs: Runs
) -> None:
    folder, told = runs
    choices = RUNS[name][3]
    meta = read_meta(run_folder(folder, name, 2, 1) / str(STEPS))
    assert meta.cpu_matmul == choices
    for rank, choice in enumerate(choices):
        value = {"default": "ieee", "onednn": "bf16"}[choice]
        assert f"trains with {value}" in told[rank][f"{name}-2-1"].lines


def test_losses_are_those_of_torchs_default(runs: Runs) -> None:
    expected = curve(runs[0], "default", 2, 1)
    assert len(expected) == STEPS
    for name in RUNS:
        assert curve(runs[0], name, 2, 1) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("again", "onednn"),
        ("resumed", "onednn"),
        ("default-resumed", "default"),
        ("mixed-resumed", "mixed"),
    ],
)
def test_the_same_choice_gives_the_same_bits(name: str, whole: str, runs: Runs) -> None:
    for key in ("loss", "grad_norm"):
        assert curve(runs[0], name, 2, 1, key) == curve(runs[0], whole, 2, 1, key)


# run, rank, and a line in this rank's log
LINES = [
    ("onednn", 0, f"CPU matmul: oneDNN ({EPYC})"),
    ("default", 0, f"CPU matmul: torch's default ({EPYC})"),
    ("mixed", 0, f"CPU matmul: oneDNN ({EPYC}) on rank 0; torch's default ({XEON}) on rank 1"),
    ("asked", 0, "--cpu-matmul is now default, it was onednn"),
    (
        "moved",
        1,
        "the checkpoint was made with oneDNN: oneDNN fp32 matmul needs AVX-512, which this CPU "
        f"({CPUS[OLD].name}) lacks; using torch's default",
    ),
]


@pytest.mark.parametrize(("name", "rank", "line"), LINES)
def test_it_is_told_in_one_line(name: str, rank: int, line: str, runs: Runs) -> None:
    assert runs[1][rank][f"{name}-2-1"].lines.count(line) == 1
