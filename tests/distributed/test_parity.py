"""Tests runs in shapes P x R against the same Hugging Face model, trained in one process.

Runs of 20 iterations are compared with this reference; their learning rate is high enough to change
the loss. Each family, schedule, P and R occurs in at least one of them. Runs of few updates are
compared with each other, bit for bit, because they differ only in settings that must change no bit.
The slow test has every combination.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest

from checkpoint.steps.meta import read_meta
from comm.topology import Topology
from modules.layers.selective import MODES
from pipeline_parallel.schedule.schedules import SCHEDULES
from tests.support.cases import Case, curve, meet_at, run_folder, train_cases, weights_of
from tests.support.data import make_texts, write_jsonl
from tests.support.launcher import run_ranks
from tests.support.models import make_hf, make_shards
from tests.support.parity import (
    DROPOUT,
    LAYERS,
    MODELS_TRIED,
    SHORT,
    TOLERANCE,
    UPDATES,
    blocks,
    flags,
    reference,
    worst,
)

Shape = tuple[int, int]
CLIPPED = 0.1  # a gradient norm that every update exceeds
# The head has the multiply-adds of three and a half blocks, so an even split in two stages is 4,1.
HEAVY_HEAD = ("gptneox", {"num_hidden_layers": LAYERS, "vocab_size": 1000})
MODELS = {**MODELS_TRIED, "dropout": DROPOUT, "heavy-head": HEAVY_HEAD}
ONE, TWO, FOUR = (1, 1), (2, 1), (4, 1)
ONE_TWICE, TWO_TWICE, FOUR_TWICE = (1, 2), (2, 2), (4, 2)
SHAPES = [ONE, TWO, ONE_TWICE, FOUR, TWO_TWICE, FOUR_TWICE]


class Run(NamedTuple):
    """One run: its model, its iterations per update, its shape, and its additional flags."""

    model: str
    accumulate: int
    shape: Shape
    changes: Mapping[str, Any] = {}

    @property
    def name(self) -> str:
        words = (f"{flag}={value}" for flag, value in self.changes.items())
        return "-".join([self.model, f"{self.accumulate}", *words])

    @property
    def id(self) -> str:
        return f"{self.name}-{self.shape[0]}-{self.shape[1]}"


def scheduled(schedule: str, recompute: str = "true") -> dict[str, Any]:
    """Returns the flags of a schedule; each of a batch's four rows is a microbatch of its own."""
    return {"pp-mode": schedule, "recompute": recompute, "micro-batch-size": 1}


PARITY = [
    Run("neox", 1, TWO_TWICE, {"max-grad-norm": CLIPPED, "recompute": "false"}),
    Run("neox", 2, ONE),
    Run("neox-sequential", 1, FOUR, scheduled("1f1b")),
    Run("gptj", 1, ONE_TWICE),
    Run("gptj", 2, TWO, {"pp-mode": "zb-h1", "recompute": "selective"}),
    Run("llama", 1, TWO_TWICE),
    Run("qwen3", 1, FOUR, scheduled("zb-h1")),
]
PLAIN = {"recompute": "false"}
# Groups of runs with the same bits: only the number of replicas changes bits.
SAME: dict[str, list[Run]] = {
    "stages": [Run("gptj", 1, shape) for shape in (ONE, TWO, FOUR)],
    "stages, two replicas": [
        Run("neox-sequential", 1, ONE_TWICE),
        Run("neox-sequential", 1, FOUR_TWICE, {"pp-mode": "zb-h1"}),
    ],
    "dropout": [Run("dropout", 1, ONE), Run("dropout", 1, FOUR, PLAIN)],
    "dropout, two replicas": [
        Run("dropout", 1, ONE_TWICE, {"recompute": "selective"}),
        Run("dropout", 1, TWO_TWICE),
    ],
    "schedules": [
        Run("neox", 1, TWO, scheduled("gpipe", "true")),
        Run("neox", 1, TWO, scheduled("1f1b", "false")),
        Run("neox", 1, TWO, scheduled("zb-h1", "true")),
        Run("neox", 1, FOUR, scheduled("gpipe", "false")),
        Run("neox", 1, FOUR, scheduled("1f1b", "true")),
        Run("neox", 1, FOUR, scheduled("zb-h1", "false")),
    ],
    "schedules and buckets, two replicas": [
        Run("neox", 1, TWO_TWICE, scheduled("gpipe", "false")),
        Run("neox", 1, TWO_TWICE, scheduled("1f1b", "true")),
        Run("neox", 1, TWO_TWICE, scheduled("zb-h1", "false")),
        Run("neox", 1, TWO_TWICE, scheduled("zb-h1") | {"zero-stage": 0}),
        Run("neox", 1, ONE_TWICE, scheduled("zb-h1") | {"zero-stage": 1}),
    ],
    "grouped heads": [
        Run("qwen3", 1, ONE, scheduled("gpipe", "false")),
        Run("qwen3", 1, FOUR, scheduled("zb-h1")),
    ],
    "layers listed": [Run("gptj", 1, TWO), Run("gptj", 1, TWO, {"num-layers": "1,4"})],
    "auto": [Run("heavy-head", 1, shape, {"num-layers": "auto"}) for shape in (ONE, TWO)],
}

ALL_PARITY = [
    *(Run(*one) for one in product(MODELS_TRIED, (1, 2), SHAPES)),
    *(Run("neox", 1, shape, {"max-grad-norm": CLIPPED}) for shape in SHAPES),
    *(
        Run("neox", 1, shape, scheduled(mode, recompute))
        for mode, recompute in product(SCHEDULES, MODES)
        for shape in (TWO, TWO_TWICE, FOUR)
    ),
]
BY_REPLICAS = [(ONE, TWO, FOUR), (ONE_TWICE, TWO_TWICE, FOUR_TWICE)]
ALL_SAME = {
    **{
        f"{model}, {accumulate}, R={shapes[0][1]}": [Run(model, accumulate, s) for s in shapes]
        for model, accumulate, shapes in product([*MODELS_TRIED, "dropout"], (1, 2), BY_REPLICAS)
    },
    **{
        f"schedules, R={shapes[0][1]}": [
            Run("neox", 1, shape, scheduled(mode, recompute) | zero)
            for mode, recompute in product(SCHEDULES, MODES)
            for shape in shapes
            for zero in ([{}] if shape[1] == 1 else [{}, {"zero-stage": 0}, {"zero-stage": 1}])
        ]
        for shapes in BY_REPLICAS
    },
    **{
        f"listed, {layers}": [Run("gptj", 1, shape), Run("gptj", 1, shape, {"num-layers": layers})]
        for shape, layers in ((TWO, "1,4"), (TWO_TWICE, "1,4"), (FOUR, "1,2,1,1"))
    },
    "auto": SAME["auto"],
}


def small_buckets(topology: Topology) -> AbstractContextManager[object]:
    """Returns a context in which buckets are small, so that a stage's gradients fill several."""
    return patch("data_parallel.grad_buffer.BUCKET_BYTES", 4096)


def train_all(folder: Path, parity: Sequence[Run], same: Mapping[str, Sequence[Run]]) -> None:
    """Trains all runs; the runs in `same` have few updates, and write to the folder `short`."""
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    write_jsonl(folder / "b.jsonl", make_texts(60, seed=2))
    for name, model in MODELS.items():
        make_shards(folder, name, *model)
    cases = [case_of(folder, run, updates=updates_of(run)) for run in parity]
    short = {run.id: run for runs in same.values() for run in runs}
    cases += [case_of(folder, run, "short/", updates=SHORT) for run in short.values()]
    for size in (1, 2, 4, 8):
        shapes = [shape for shape in SHAPES if shape[0] * shape[1] == size]
        run_ranks(size, train_cases, meet_at(shapes), cases, folder, deadline=1200.0)


def updates_of(run: Run) -> int:
    return UPDATES // run.accumulate


def case_of(folder: Path, run: Run, place: str = "", *, updates: int) -> Case:
    own = flags(folder, run.model, MODELS[run.model][0], run.accumulate, updates=updates)
    hook = small_buckets if "zero-stage" in run.changes else None
    # The classes of some families' tokenizers would add tokens of their own.
    changed = own | {"tokenizer-name": f"{folder}/shards/neox"} | dict(run.changes)
    return Case(f"{place}{run.name}", changed, hook, shapes=[run.shape])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parity")
    train_all(path, PARITY, SAME)
    return path


def reference_of(folder: Path, run: Run) -> tuple[list[float], list[float]]:
    family, changes = MODELS[run.model]
    model = make_hf(family, **{"vocab_size": 400, **changes})
    norm = run.changes.get("max-grad-norm", 1.0)
    return reference(model, blocks(folder), run.accumulate, norm, updates=updates_of(run))


def check_parity(folder: Path, run: Run, expected: tuple[list[float], list[float]]) -> None:
    losses, norms = expected
    assert max(losses) - min(losses) > 0.2, "the loss changes"
    if "max-grad-norm" in run.changes:
        assert min(norms) > CLIPPED
    assert max(norms) > 1.0, "some updates are clipped"
    for key, theirs in (("loss", losses), ("grad_norm", norms)):
        ours = curve(folder, run.name, *run.shape, key)
        error = worst([n for n in ours if n is not None], theirs)
        print(f"{run.id}, {key}: {error:.1e}")
        assert error < TOLERANCE


def check_same(folder: Path, runs: Sequence[Run]) -> None:
    first, *others = runs
    for key in ("loss", "grad_norm", "lr"):
        expected = curve(folder / "short", first.name, *first.shape, key)
        assert len(expected) == SHORT * first.accumulate
        for run in others:
            assert curve(folder / "short", run.name, *run.shape, key) == expected, run.id
    weights = weights_of(folder / "short", first.name, *first.shape)
    for run in others:
        assert weights_of(folder / "short", run.name, *run.shape) == weights, run.id


@pytest.mark.parametrize("run", PARITY, ids=[run.id for run in PARITY])
def test_losses_are_those_of_one_process(run: Run, folder: Path) -> None:
    expected = reference_of(folder, run)
    check_parity(folder, run, expected)
    if "max-grad-norm" in run.changes:
        unclipped, _ = reference_of(folder, run._replace(changes={}))
        assert worst(expected[0], unclipped) > 10 * TOLERANCE, "clipping changes the losses"


@pytest.mark.parametrize("name", SAME)
def test_bits_depend_on_replicas_alone(name: str, folder: Path) -> None:
    """Stages, split, schedule, recompute and gradient buckets change no bit of loss or weights."""
    check_same(folder, SAME[name])


def test_dropout_is_the_same_for_other_replicas(folder: Path) -> None:
    one, two = (curve(folder / "short", "dropout-1", *shape) for shape in (ONE, TWO_TWICE))
    assert worst(two, one) < TOLERANCE
    without, _ = reference_of(folder, Run("neox", 1, ONE))
    assert abs(one[0] - without[0]) > 1e-4 * without[0]


def test_layers_are_split_as_listed_and_as_auto_chooses(folder: Path) -> None:
    runs = [SAME["layers listed"][1], *SAME["auto"]]
    splits = [
        read_meta(run_folder(folder / "short", run.name, *run.shape) / str(SHORT)).num_layers
        for run in runs
    ]
    assert splits == [(1, 4), (LAYERS,), (4, 1)]


@pytest.mark.slow
def test_the_whole_matrix(tmp_path: Path) -> None:
    """Runs in ALL_PARITY have the reference's losses; bits are equal in each group of ALL_SAME."""
    train_all(tmp_path, ALL_PARITY, ALL_SAME)
    references: dict[tuple[str, int, float | None], Any] = {}
    for run in ALL_PARITY:
        key = (run.model, run.accumulate, run.changes.get("max-grad-norm"))
        if key not in references:
            references[key] = reference_of(tmp_path, run)
        check_parity(tmp_path, run, references[key])
    for runs in ALL_SAME.values():
        check_same(tmp_path, runs)
