"""Tests fp16 runs against a reference in one process, and compares runs of different shapes."""

from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch

from tests.support.cases import Case, Told, meet_at, train_cases, weights_of
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.fp16_twin import LAYERS, LR, TOKENS, WARMUP, Recipe, twin
from tests.support.launcher import run_ranks
from tests.support.mixed import lines_of, model_flags, rows_of_a_replica
from tests.support.models import make_shards
from tests.support.parity import worst
from tests.support.poison import Overflow

Shape = tuple[int, int]
# Two shapes that differ only in stages, and two that differ in replicas.
SHAPES: dict[str, list[Shape]] = {
    "huge": [(4, 1), (1, 2), (2, 2)],
    "bf16": [(2, 1), (4, 1), (2, 2)],
}
HUGE = 2.0**28
# Kind, schedule, recompute and shape; gpipe does not recompute.
SCHEDULED = [("huge", "zb-h1", "true", (2, 2)), ("bf16", "1f1b", "false", (4, 1))]
RANKS = (0, 3)  # of two stages and two replicas; the ranks differ in stage and replica
RECIPES = {
    "hysteresis-1": Recipe(hysteresis=1, poisoned=(2, 7)),
    "hysteresis-2": Recipe(hysteresis=2, poisoned=(2, 3, 8)),
    "accumulated": Recipe(accumulate=2, updates=6, window=2, poisoned=(4,)),
    "clipped": Recipe(max_norm=0.5, poisoned=(5,)),
    "huge": Recipe(scale=HUGE, hysteresis=2, updates=18),
}
# 1e-7 was measured, from the sums of token losses; gradients are the same
# (tests.support.fp16_twin). One more rounding in the clipping gives 9e-6.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-6  # 2e-16 was measured
# R=2 computes (a + b) + (c + d), R=1 computes ((a + b) + c) + d, in fp32. Therefore norms differ
# (6e-8 was measured); losses would differ if a weight were rounded the other way.
REPLICAS_TOLERANCE = 1e-4


def flags(folder: Path, recipe: Recipe) -> dict[str, Any]:
    return {
        **model_flags(folder),
        **flags_of(f"""
            --seq-length {TOKENS} --gradient-accumulate-step {recipe.accumulate}
            --total-steps {recipe.updates * recipe.accumulate} --warmup-steps {WARMUP} --lr {LR}
            --weight-decay 0.1 --recompute false --max-grad-norm {recipe.max_norm}
            --initial-loss-scale {recipe.scale} --loss-scale-window {recipe.window}
            --hysteresis {recipe.hysteresis}
        """),
        "batch-size": rows_of_a_replica,
        "cpu-matmul": "default",  # as in the reference
    }


def train_with_products_in_fp32(*args: Any) -> dict[str, Told]:
    """Trains with matmuls in fp32, as the reference does, even on a CPU that multiplies in fp16."""
    with patch("modules.matmul.rounding.rounds_matmul", return_value=True):
        return train_cases(*args)


class Trained(NamedTuple):
    """The folder of all runs, and each process's log of each run with four ranks."""

    folder: Path
    told: list[dict[str, Told]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trains the runs of SHAPES and SCHEDULED, and fp16 runs in which one rank overflows."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mixed")
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": LAYERS})
    of_fp16 = {name: flags(folder, recipe) | {"fp16": "true"} for name, recipe in RECIPES.items()}
    bf16 = flags(folder, Recipe(max_norm=1.0)) | {"bf16": "true"}
    own = {"huge": of_fp16["huge"], "bf16": bf16}
    cases = [Case(name, own[name], shapes=shapes) for name, shapes in SHAPES.items()]
    for name, mode, recompute, shape in SCHEDULED:
        changed = own[name] | {"pp-mode": mode, "recompute": recompute}
        cases.append(Case(f"{name}-{mode}", changed, shapes=[shape]))
    cases += [
        Case(f"{name}-on-{rank}", of_fp16[name], hook=poison(recipe, rank), shapes=[(2, 2)])
        for name, recipe in RECIPES.items()
        if recipe.poisoned
        for rank in (RANKS if name == "hysteresis-1" else RANKS[-1:])
    ]
    for size, shapes in {2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}.items():
        args = (meet_at(shapes), cases, folder)
        told = run_ranks(size, train_with_products_in_fp32, *args, deadline=300.0)
    return Trained(folder, told)


def poison(recipe: Recipe, rank: int) -> Overflow:
    return Overflow(rank, [update * recipe.accumulate for update in recipe.poisoned])


@pytest.mark.parametrize("name", RECIPES)
def test_fp16_is_its_twin(name: str, trained: Trained) -> None:
    recipe = RECIPES[name]
    run = f"{name}-on-3" if recipe.poisoned else name
    ours, expected = lines_of(trained.folder, run, 2, 2), twin(trained.folder, recipe)
    for key in ("lr", "loss_scale"):
        assert [line[key] for line in ours] == [line[key] for line in expected]
    for key, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        error = worst([line[key] for line in ours], [line[key] for line in expected])
        print(f"{name}, {key}: {error:.1e}")
        assert error <= tolerance
    ends = enumerate(ours, start=1)
    skipped = [i for i, line in ends if line["lr"] is not None and line["grad_norm"] is None]
    if recipe.poisoned:
        assert skipped == [update * recipe.accumulate for update in recipe.poisoned]
    assert min(line["loss"] for line in ours) < max(line["loss"] for line in ours) - 0.2


def check_same(folder: Path, one: tuple[str, Shape], other: tuple[str, Shape]) -> None:
    """Checks that two runs, given by name and shape, have the same metrics and weights."""
    for read in (lines_of, weights_of):
        assert read(folder, one[0], *one[1]) == read(folder, other[0], *other[1])


@pytest.mark.parametrize("rank", RANKS)
def test_an_overflow_is_the_same_wherever_it_happens(rank: int, trained: Trained) -> None:
    """Metrics and weights do not depend on the rank that overflows; all ranks log each skip."""
    name, shape = f"hysteresis-1-on-{rank}", (2, 2)
    check_same(trained.folder, (name, shape), ("hysteresis-1-on-3", shape))
    where = (
        "stage 0, layer 0, post_attention_layernorm.weight",
        "stage 1, layer 2, post_attention_layernorm.bias",
    )[rank % 2]
    expected = [
        f"step {step}: update skipped at loss scale 1024: {where} has a gradient that is not finite"
        for step in (2, 7)
    ]
    for told in trained.told:
        lines = told[f"{name}-2-2"].lines
        assert [line for line in lines if "skipped" in line] == expected


def test_every_shape_finds_the_same_scales_from_a_huge_one(trained: Trained) -> None:
    runs = [lines_of(trained.folder, "huge", *shape) for shape in SHAPES["huge"]]
    scales = [line["loss_scale"] for line in runs[0]]
    assert scales[0] == HUGE
    assert scales[-1] < HUGE / 2**5
    assert all([line["loss_scale"] for line in run] == scales for run in runs)
    skips = [[line["grad_norm"] is None for line in run] for run in runs]
    assert all(one == skips[0] for one in skips)
    assert not all(skips[0])


@pytest.mark.parametrize(
    ("name", "one", "other"), [("bf16", (2, 1), (4, 1)), ("huge", (1, 2), (2, 2))]
)
def test_bits_do_not_depend_on_the_number_of_stages(
    name: str, one: Shape, other: Shape, trained: Trained
) -> None:
    check_same(trained.folder, (name, one), (name, other))


@pytest.mark.parametrize(("name", "mode", "_recompute", "shape"), SCHEDULED)
def test_bits_do_not_depend_on_the_schedule(
    name: str, mode: str, _recompute: str, shape: Shape, trained: Trained
) -> None:
    check_same(trained.folder, (f"{name}-{mode}", shape), (name, shape))


@pytest.mark.parametrize("name", ["bf16", "huge"])
def test_more_replicas_add_the_same_gradients_in_another_order(name: str, trained: Trained) -> None:
    """R changes losses and gradient norms by rounding only; the number of stages changes no bit."""
    one, two = (lines_of(trained.folder, name, *shape) for shape in ((4, 1), (2, 2)))
    for key in ("loss", "grad_norm"):
        error = worst([line[key] for line in two], [line[key] for line in one])
        print(f"{name}, {key}, R=2 against R=1: {error:.1e}")
        assert error < REPLICAS_TOLERANCE
    assert one[-1]["loss"] < one[0]["loss"] - 0.2
