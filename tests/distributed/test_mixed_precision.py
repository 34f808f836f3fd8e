"""fp16 and bf16 training over stages and replicas against one process that does the same."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.support.cases import Case, Told, meet_at, train_cases, weights_of
from tests.support.data import make_texts, write_jsonl
from tests.support.fp16_twin import LAYERS, LR, TOKENS, WARMUP, Recipe, twin
from tests.support.launcher import run_ranks
from tests.support.mixed import lines_of, model_flags, rows_of_a_replica
from tests.support.models import make_shards
from tests.support.parity import worst
from tests.support.poison import Overflow

SHAPES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}
ALL_SHAPES = [shape for shapes in SHAPES.values() for shape in shapes]
HUGE = 2.0**36
SCHEDULES = [("1f1b", "false"), ("zb-h1", "true")]  # and whether to recompute: gpipe does not
SCHEDULED = [(2, 1), (2, 2), (4, 1)]
RECIPES = {
    "hysteresis-1": Recipe(hysteresis=1, poisoned=(2, 7)),
    "hysteresis-2": Recipe(hysteresis=2, poisoned=(2, 3, 8)),
    "accumulated": Recipe(accumulate=2, updates=6, window=2, poisoned=(4,)),
    "clipped": Recipe(max_norm=0.5, poisoned=(5,)),
    "huge": Recipe(scale=HUGE, hysteresis=2, updates=26),
}
# 1e-7 measured, the sums of token losses alone: gradients are the same (tests.support.fp16_twin).
# One rounding more in the clipping makes 9e-6.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-6  # 2e-16 measured
# R=2 adds up (a + b) + (c + d), R=1 ((a + b) + c) + d, in fp32. The norms show it (6e-8 measured);
# losses would where a weight rounds the other way.
REPLICAS_TOLERANCE = 1e-4


def flags(folder: Path, recipe: Recipe) -> dict[str, Any]:
    return {
        **model_flags(folder),
        "seq-length": TOKENS,
        "batch-size": rows_of_a_replica,
        "gradient-accumulate-step": recipe.accumulate,
        "total-steps": recipe.updates * recipe.accumulate,
        "warmup-steps": WARMUP,
        "lr": LR,
        "weight-decay": 0.1,
        "recompute": "false",
        "max-grad-norm": recipe.max_norm,
        "cpu-matmul": "default",  # the twin's
        "initial-loss-scale": recipe.scale,
        "loss-scale-window": recipe.window,
        "hysteresis": recipe.hysteresis,
    }


def train_with_products_in_fp32(*args: Any) -> dict[str, Told]:
    """As the twin has them, also on a processor that has products of fp16."""
    with patch("modules.matmul.rounding.rounds_matmul", return_value=True):
        return train_cases(*args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of all shapes; `told` is what each process said, by world size, rank and run."""
    folder = tmp_path_factory.mktemp("mixed")
    torch.set_num_threads(1)
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": LAYERS})
    of_fp16 = {name: flags(folder, recipe) | {"fp16": "true"} for name, recipe in RECIPES.items()}
    cases = [
        Case("huge", of_fp16["huge"], shapes=ALL_SHAPES),
        Case("bf16", flags(folder, Recipe(max_norm=1.0)) | {"bf16": "true"}),
    ]
    cases += [
        Case(
            f"{case.name}-{mode}",
            case.flags | {"pp-mode": mode, "recompute": recompute},
            shapes=SCHEDULED,
        )
        for case in cases[:2]
        for mode, recompute in SCHEDULES
    ]
    cases += [
        Case(f"{name}-on-{rank}", of_fp16[name], hook=poison(recipe, rank), shapes=[(2, 2)])
        for name, recipe in RECIPES.items() if recipe.poisoned
        for rank in (range(4) if name == "hysteresis-1" else (3,))
    ]  # fmt: skip
    told = {
        world_size: run_ranks(
            world_size, train_with_products_in_fp32, meet_at(shapes), cases, folder, deadline=300.0
        )
        for world_size, shapes in SHAPES.items()
    }
    return {"folder": folder, "told": told[4]}


def poison(recipe: Recipe, rank: int) -> Overflow:
    return Overflow(rank, [update * recipe.accumulate for update in recipe.poisoned])


@pytest.mark.parametrize("name", RECIPES)
def test_fp16_is_its_twin(name: str, trained: dict[str, Any]) -> None:
    recipe = RECIPES[name]
    run = f"{name}-on-3" if recipe.poisoned else name
    ours, expected = lines_of(trained["folder"], run, 2, 2), twin(trained["folder"], recipe)
    for key in ("lr", "loss_scale"):
        assert [line[key] for line in ours] == [line[key] for line in expected]
    for key, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", NORM_TOLERANCE)):
        error = worst([line[key] for line in ours], [line[key] for line in expected])
        print(f"{name}, {key}: {error:.1e}")
        assert error <= tolerance
    skipped = [
        i + 1 for i, line in enumerate(ours) if line["lr"] is not None and line["grad_norm"] is None
    ]
    if recipe.poisoned:
        assert skipped == [update * recipe.accumulate for update in recipe.poisoned]
    assert min(line["loss"] for line in ours) < max(line["loss"] for line in ours) - 0.2


@pytest.mark.parametrize("rank", range(3))
def test_an_overflow_is_the_same_wherever_it_happens(rank: int, trained: dict[str, Any]) -> None:
    folder = trained["folder"]
    assert lines_of(folder, f"hysteresis-1-on-{rank}", 2, 2) == lines_of(
        folder, "hysteresis-1-on-3", 2, 2
    )
    assert weights_of(folder, f"hysteresis-1-on-{rank}", 2, 2) == weights_of(
        folder, "hysteresis-1-on-3", 2, 2
    )


@pytest.mark.parametrize("rank", range(4))
def test_a_skip_names_the_first_gradient_that_is_not_finite(
    rank: int, trained: dict[str, Any]
) -> None:
    """Once for each skip, on every rank, of which the console shows rank 0's."""
    where = (
        "stage 0, layer 0, post_attention_layernorm.weight",
        "stage 1, layer 2, post_attention_layernorm.bias",
    )[rank % 2]
    expected = [
        f"step {step}: update skipped at loss scale 1024: {where} has a gradient that is not finite"
        for step in (2, 7)
    ]
    for told in trained["told"]:
        lines = told[f"hysteresis-1-on-{rank}-2-2"].lines
        assert [line for line in lines if "skipped" in line] == expected


def test_every_shape_finds_the_same_scales_from_a_huge_one(trained: dict[str, Any]) -> None:
    runs = [lines_of(trained["folder"], "huge", *shape) for shape in ALL_SHAPES]
    scales = [line["loss_scale"] for line in runs[0]]
    assert scales[0] == HUGE
    assert scales[-1] < HUGE / 2**15
    assert all([line["loss_scale"] for line in run] == scales for run in runs)
    skips = [[line["grad_norm"] is None for line in run] for run in runs]
    assert all(one == skips[0] for one in skips)
    assert not all(skips[0])


@pytest.mark.parametrize("name", ["bf16", "huge"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_bits_do_not_depend_on_the_number_of_stages(
    name: str, replicas: int, trained: dict[str, Any]
) -> None:
    folder = trained["folder"]
    shapes = [shape for shape in ALL_SHAPES if shape[1] == replicas]
    assert len(shapes) >= 2
    for shape in shapes[1:]:
        assert lines_of(folder, name, *shape) == lines_of(folder, name, *shapes[0])
        assert weights_of(folder, name, *shape) == weights_of(folder, name, *shapes[0])


@pytest.mark.parametrize("shape", SCHEDULED)
@pytest.mark.parametrize("mode", [mode for mode, _ in SCHEDULES])
@pytest.mark.parametrize("name", ["bf16", "huge"])
def test_bits_do_not_depend_on_the_schedule(
    name: str, mode: str, shape: tuple[int, int], trained: dict[str, Any]
) -> None:
    folder = trained["folder"]
    assert lines_of(folder, f"{name}-{mode}", *shape) == lines_of(folder, name, *shape)
    assert weights_of(folder, f"{name}-{mode}", *shape) == weights_of(folder, name, *shape)


@pytest.mark.parametrize("name", ["bf16", "huge"])
def test_more_replicas_add_the_same_gradients_in_another_order(
    name: str, trained: dict[str, Any]
) -> None:
    one, two = (lines_of(trained["folder"], name, 2, replicas) for replicas in (1, 2))
    for key in ("loss", "grad_norm"):
        error = worst([line[key] for line in two], [line[key] for line in one])
        print(f"{name}, {key}, R=2 against R=1: {error:.1e}")
        assert error < REPLICAS_TOLERANCE
    assert one[-1]["loss"] < one[0]["loss"] - 0.2
