"""fp16 and bf16 training over stages and replicas against one process that does the same.

The twin of fp16 is plain torch: our modules in half precision on one process, AdamW on fp32
masters, torch.amp.GradScaler whose scale the rule moves. What it shares with the code under test is
the forward pass alone, which tests/modules hold against transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from transformers import get_linear_schedule_with_warmup

from checkpoint.loading import load_shards_
from modules.registry import MODELS
from modules.stage_model import StageModel
from monitor.metrics import read_metrics
from tasks.build import open_training_stream
from tasks.registry import SourceSpec
from tests.dist import run_ranks
from tests.poison import Overflow
from tests.runs import Case, meet_at, run_folder, train_cases
from tests.tasks.material import make_texts, tokenizer, write_jsonl
from tests.test_parity import make_shards

LAYERS, ROWS, TOKENS, UPDATES, WARMUP, LR = 4, 4, 16, 10, 2, 2e-3
REPLICAS = 2  # of the runs that have a twin
SHAPES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)]}
ALL_SHAPES = [shape for shapes in SHAPES.values() for shape in shapes]
KEYS = ("loss", "lr", "grad_norm", "loss_scale")
HUGE = 2.0**36


@dataclass(frozen=True)
class Recipe:
    """What a run with a twin does: `poisoned` updates, counted from 1, overflow."""

    updates: int = UPDATES
    accumulate: int = 1
    scale: float = 1024.0
    hysteresis: int = 1
    window: int = 3
    max_norm: float = float("inf")
    poisoned: Collection[int] = ()


RECIPES = {
    "hysteresis-1": Recipe(hysteresis=1, poisoned=(2, 7)),
    "hysteresis-2": Recipe(hysteresis=2, poisoned=(2, 3, 8)),
    "accumulated": Recipe(accumulate=2, updates=6, window=2, poisoned=(4,)),
    "clipped": Recipe(max_norm=0.5, poisoned=(5,)),
    "huge": Recipe(scale=HUGE, hysteresis=2, updates=26),
}
# Losses: the same bits when measured, clipped or not. One rounding more in the clipping of the twin
# could round a half-precision weight the other way, so that is not promised.
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-6  # torch sums the squares in fp32, we in double: 7e-8 measured
# R=2 adds up (a + b) + (c + d), R=1 ((a + b) + c) + d. In fp32 both are exact for the few short
# numbers of a half-precision gradient here, so no difference was measured; with more of them, or
# farther apart, sums are rounded, and then a weight may round the other way.
REPLICAS_TOLERANCE = 1e-4


def layers_of_a_stage(stages: int, replicas: int) -> int:
    return LAYERS // stages


def rows_of_a_replica(stages: int, replicas: int) -> int:
    return ROWS // replicas


def model_flags(folder: Path) -> dict[str, Any]:
    """The model and the data that all runs in mixed precision train on."""
    return {
        "model-name": folder / "shards" / "model",
        "model-type": "gptneox",
        "num-layers": layers_of_a_stage,
        "embedding-dim": 32,
        "task-name": folder / "a.jsonl",
    }


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
        "initial-loss-scale": recipe.scale,
        "loss-scale-window": recipe.window,
        "hysteresis": recipe.hysteresis,
    }


def moved(scale: float, left: int, clean: int, overflow: bool, recipe: Recipe) -> tuple[
    float, int, int
]:  # fmt: skip
    """The rule: the scale, what is left of the hysteresis, and clean updates in a row, after."""
    if overflow:
        left = max(left - 1, 0)
        return (scale / 2 if left == 0 else scale), left, 0
    if clean + 1 == recipe.window:
        return scale * 2, recipe.hysteresis, 0
    return scale, left, clean + 1


def twin(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """The lines that a run's metrics should have, from one process."""
    model = load_model(folder).half()
    compute = list(model.parameters())
    masters = [p for module in load_model(folder) for p in module.parameters()]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in masters if p.dim() >= 2], "weight_decay": 0.1},
         {"params": [p for p in masters if p.dim() < 2], "weight_decay": 0.0}],
        lr=LR, eps=1e-6,
    )  # fmt: skip
    schedule = get_linear_schedule_with_warmup(adamw, WARMUP, recipe.updates)
    scaler = torch.amp.GradScaler("cpu", init_scale=recipe.scale)
    scale, left, clean, lines = recipe.scale, recipe.hysteresis, 0, []
    blocks = open_training_stream(
        [SourceSpec(str(folder / "a.jsonl"))], tokenizer(), seq_length=TOKENS, seed=42
    )
    nominal = recipe.accumulate * ROWS * (TOKENS - 1)
    for update in range(1, recipe.updates + 1):
        sums = [[torch.zeros_like(p) for p in masters] for _ in range(REPLICAS)]
        for _ in range(recipe.accumulate):
            loss = 0.0
            for replica in sums:
                of_replica = 0.0
                for _ in range(ROWS // REPLICAS):
                    tokens = torch.from_numpy(blocks.next_block().tokens)[None]
                    token_loss = functional.cross_entropy(
                        model(tokens, None).float()[0], tokens[0, 1:], reduction="sum"
                    )
                    made = torch.autograd.grad(scaler.scale(token_loss / nominal), compute)
                    for total, gradient in zip(replica, made, strict=True):
                        total += gradient
                    of_replica += token_loss.item()
                loss += of_replica
            lines.append({"loss": loss / (ROWS * (TOKENS - 1)), "lr": None, "grad_norm": None,
                          "loss_scale": scale})  # fmt: skip
        for master, *of_replicas in zip(masters, *sums, strict=True):
            master.grad = sum(of_replicas[1:], of_replicas[0])
        if update in recipe.poisoned:
            assert masters[0].grad is not None
            masters[0].grad[0, 0] = float("inf")
        scaler.unscale_(adamw)
        norm = clip_grad_norm_(masters, recipe.max_norm)
        overflow = not norm.isfinite().item()
        lines[-1] |= {
            "lr": schedule.get_last_lr()[0],
            "grad_norm": None if overflow else norm.item(),
        }
        scaler.step(adamw)
        if not overflow:
            schedule.step()
        scale, left, clean = moved(scale, left, clean, overflow, recipe)
        scaler.update(new_scale=scale)
        with torch.no_grad():
            for half, master in zip(compute, masters, strict=True):
                half.copy_(master)
    return lines


def load_model(folder: Path) -> StageModel:
    shards, family = folder / "shards" / "model", MODELS["gptneox"].load()
    config = family.load_config(shards)
    model = StageModel(family, config, range(LAYERS + 2), device="cpu")
    load_shards_(model, shards, family, config)
    return model


def lines_of(folder: Path, name: str, stages: int, replicas: int) -> list[dict[str, Any]]:
    lines = read_metrics(run_folder(folder, name, stages, replicas) / "metrics.jsonl")
    return [{key: line[key] for key in KEYS if key in line} for line in lines]


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
        Case(f"{name}-on-{rank}", of_fp16[name], hook=poison(recipe, rank), shapes=[(2, 2)])
        for name, recipe in RECIPES.items() if recipe.poisoned
        for rank in (range(4) if name == "hysteresis-1" else (3,))
    ]  # fmt: skip
    told = {
        world_size: run_ranks(
            world_size, train_cases, meet_at(shapes), cases, folder, deadline=300.0
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
    skipped = [i + 1 for i, line in enumerate(ours) if line["lr"] is not None
               and line["grad_norm"] is None]  # fmt: skip
    if recipe.poisoned:
        assert skipped == [update * recipe.accumulate for update in recipe.poisoned]
    assert min(line["loss"] for line in ours) < max(line["loss"] for line in ours) - 0.2


def worst(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """The largest relative difference; both have their None in the same places."""
    errors = [0.0]
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            errors.append(abs(a - b) / abs(b))
    return max(errors)


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


def weights_of(
    folder: Path, name: str, stages: int, replicas: int, step: int | None = None
) -> list[bytes]:
    """All weights of a checkpoint, by default the last, in the order of the layers, as bytes."""
    path = run_folder(folder, name, stages, replicas)
    saved = path / ((path / "latest").read_text() if step is None else str(step))
    return [
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for stage in range(stages)
        for tensor in torch.load(saved / f"prank_{stage}_checkpoint.pt", weights_only=True).values()
    ]
