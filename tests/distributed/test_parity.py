"""Every pipeline x data shape against the Hugging Face model trained in one process.

The reference sees the same blocks, in plain torch: one optimizer, one loss, no code of ours but
what reads the blocks. 20 updates, at a rate where the loss moves.
"""

import json
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from checkpoint.conversion.from_hf import convert_from_hf
from modules.registry import MODELS
from pipeline_parallel.schedule.schedules import SCHEDULES
from tasks.mixture import Pack
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.cases import Case, curve, meet_at, run_folder, train_cases
from tests.support.data import make_texts, tokenizer, write_jsonl
from tests.support.dist import run_ranks
from tests.support.models import make_hf
from tests.support.schedule_cases import SCHEDULED, schedule_cases

TOLERANCE = 1e-5  # relative, what the project promises in fp32 on CPU
CLIPPED = 0.1  # a gradient norm that every update exceeds
UPDATES, ROWS, TOKENS, LAYERS, LR, WARMUP = 20, 4, 24, 7, 1e-3, 3
SHAPES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)], 8: [(4, 2)]}
ALL_SHAPES = [shape for shapes in SHAPES.values() for shape in shapes]
MODELS_TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("gptneox", {"num_hidden_layers": LAYERS}),
    "neox-sequential": (
        "gptneox",
        {"num_hidden_layers": LAYERS, "use_parallel_residual": False},
    ),
    "gptj": ("gptj", {"n_layer": LAYERS}),
}
DROPOUT = (
    "gptneox",
    {"num_hidden_layers": LAYERS, "hidden_dropout": 0.1, "attention_dropout": 0.1},
)


# A head as heavy as three and a half of the blocks: two stages that are even have 5 and 2 of them.
HEAVY_HEAD = ("gptneox", {"num_hidden_layers": LAYERS, "vocab_size": 1000})
LISTED = {2: "1,6", 4: "1,3,1,2"}
LISTED_SHAPES = [(2, 1), (2, 2), (4, 1)]


def listed_layers(stages: int, replicas: int) -> str:
    return LISTED[stages]


def make_shards(folder: Path, name: str, family: str, changes: dict[str, Any]) -> Any:
    model = make_hf(family, **{"vocab_size": 400, **changes})
    model.save_pretrained(folder / "hf" / name)
    tokenizer().save_pretrained(folder / "hf" / name)
    convert_from_hf(
        MODELS[family].load(),
        model_name=str(folder / "hf" / name),
        save_dir=folder / "shards",
        dtype="keep",
    )
    return model


def layers_of_a_stage(stages: int, replicas: int) -> int:
    """7 layers as 7; 4, 3; 2, 2, 2, 1."""
    return -(-LAYERS // stages)


def rows_of_a_replica(stages: int, replicas: int) -> int:
    return ROWS // replicas


def rows_of_a_microbatch(stages: int, replicas: int) -> int:
    """Two microbatches in each shape."""
    return ROWS // replicas // 2


def flags(folder: Path, name: str, family: str, accumulate: int) -> dict[str, Any]:
    return {
        "model-name": folder / "shards" / name,
        "model-type": family,
        "num-layers": layers_of_a_stage,
        "embedding-dim": 32,
        "task-name": f"{folder / 'a.jsonl'}:0.3,{folder / 'b.jsonl'}:0.7",
        "seq-length": TOKENS,
        "batch-size": rows_of_a_replica,
        "micro-batch-size": rows_of_a_microbatch,
        "recompute": str(accumulate == 1).lower(),
        "gradient-accumulate-step": accumulate,
        "total-steps": UPDATES * accumulate,
        "warmup-steps": WARMUP,
        "lr": LR,
        "max-grad-norm": 1.0,
        "weight-decay": 0.1,
    }


def blocks(folder: Path, pack: Pack = "concat") -> Any:
    specs = [SourceSpec(str(folder / "a.jsonl"), 0.3), SourceSpec(str(folder / "b.jsonl"), 0.7)]
    stream = open_training_stream(specs, tokenizer(), seq_len=TOKENS, seed=42, pack=pack)
    return (stream.next_block().token_ids for _ in count())


def reference(
    model: Any,
    stream: Iterator[Any],
    accumulate: int,
    max_norm: float = 1.0,
    labels_of: Callable[[Tensor], Tensor] = torch.clone,
) -> tuple[list[float], list[float]]:
    """Losses of the iterations and gradient norms of the updates, in one process.

    `stream` has a block's tokens each; `labels_of` makes the labels of some of them.
    """
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.999),
        eps=1e-6,
    )
    schedule = get_linear_schedule_with_warmup(adamw, WARMUP, UPDATES)
    losses, norms = [], []
    for _ in range(UPDATES):
        for _ in range(accumulate):
            tokens = torch.from_numpy(np.stack(list(islice(stream, ROWS))))
            loss: Tensor = model(tokens, labels=labels_of(tokens)).loss
            torch.autograd.backward(loss / accumulate)
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        adamw.step()
        schedule.step()
        adamw.zero_grad()
    return losses, norms


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All runs of all shapes, and the references."""
    folder = tmp_path_factory.mktemp("parity")
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    write_jsonl(folder / "b.jsonl", make_texts(60, seed=2))
    references: dict[str, Any] = {}
    cases: list[Case] = []
    for name, (family, changes) in MODELS_TRIED.items():
        for accumulate in (1, 2):
            key = f"{name}-{accumulate}"
            model = make_shards(folder, key, family, changes)
            references[key] = reference(model, blocks(folder), accumulate)
            cases.append(Case(key, flags(folder, key, family, accumulate)))
    model = make_shards(folder, "clipped", *MODELS_TRIED["neox"])
    references["clipped"] = reference(model, blocks(folder), 1, CLIPPED)
    cases.append(
        Case("clipped", flags(folder, "clipped", "gptneox", 1) | {"max-grad-norm": CLIPPED})
    )
    make_shards(folder, "dropout", *DROPOUT)
    cases.append(Case("dropout", flags(folder, "dropout", DROPOUT[0], 2)))
    listed = flags(folder, "gptj-1", "gptj", 1) | {"num-layers": listed_layers}
    cases.append(Case("listed", listed, shapes=LISTED_SHAPES))
    make_shards(folder, "heavy-head", *HEAVY_HEAD)
    weighed = flags(folder, "heavy-head", HEAVY_HEAD[0], 1) | {"num-layers": "auto"}
    cases.append(Case("weighed", weighed, shapes=[(1, 1), (2, 1)]))
    cases += schedule_cases(flags(folder, "neox-1", "gptneox", 1))
    for world_size, shapes in SHAPES.items():
        run_ranks(world_size, train_cases, meet_at(shapes), cases, folder, deadline=400.0)
    return {"folder": folder, "references": references}


def worst(ours: list[float], theirs: list[float]) -> float:
    assert len(ours) == len(theirs)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", ALL_SHAPES)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", MODELS_TRIED)
def test_losses_are_those_of_one_process(
    name: str, accumulate: int, shape: tuple[int, int], trained: dict[str, Any]
) -> None:
    losses, norms = trained["references"][f"{name}-{accumulate}"]
    assert max(losses) - min(losses) > 0.2, "the loss moves"
    key = f"{name}-{accumulate}"
    error = worst(curve(trained["folder"], key, *shape), losses)
    print(f"{name}, accumulation {accumulate}, P={shape[0]} R={shape[1]}: {error:.1e}")
    assert error < TOLERANCE
    found = [n for n in curve(trained["folder"], key, *shape, key="grad_norm") if n is not None]
    error = worst(found, norms)
    print(f"{name}, accumulation {accumulate}, P={shape[0]} R={shape[1]}, norms: {error:.1e}")
    assert error < TOLERANCE
    assert max(norms) > 1.0, "clipping bites"


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_clipping_that_always_bites_is_that_of_one_process(
    shape: tuple[int, int], trained: dict[str, Any]
) -> None:
    losses, norms = trained["references"]["clipped"]
    assert min(norms) > CLIPPED
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        error = worst(curve(trained["folder"], "clipped", *shape, key=key), expected)
        print(f"clipped, P={shape[0]} R={shape[1]}, {key}: {error:.1e}")
        assert error < TOLERANCE
    unclipped, _ = trained["references"]["neox-1"]
    assert worst(losses, unclipped) > 10 * TOLERANCE, "clipping shows"


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", ["neox-1", "neox-2", "neox-sequential-1", "gptj-2", "dropout"])
def test_bits_do_not_depend_on_the_number_of_stages(
    name: str, replicas: int, trained: dict[str, Any]
) -> None:
    curves = [curve(trained["folder"], name, stages, replicas) for stages in (1, 2, 4)]
    assert curves[0] == curves[1] == curves[2]
    for key in ("grad_norm", "lr"):
        rows = [curve(trained["folder"], name, stages, replicas, key) for stages in (1, 2, 4)]
        assert rows[0] == rows[1] == rows[2]


@pytest.mark.parametrize("shape", ALL_SHAPES)
def test_dropout_is_the_same_in_every_shape(
    shape: tuple[int, int], trained: dict[str, Any]
) -> None:
    folder = trained["folder"]
    assert worst(curve(folder, "dropout", *shape), curve(folder, "dropout", 1, 1)) < TOLERANCE
    assert worst(curve(folder, "dropout", 1, 1), curve(folder, "neox-2", 1, 1)) > 1e-4


@pytest.mark.parametrize("shape", SCHEDULED)
@pytest.mark.parametrize("recompute", ["true", "false"])
@pytest.mark.parametrize("mode", SCHEDULES)
def test_every_schedule_has_the_losses_of_one_process(
    mode: str, recompute: str, shape: tuple[int, int], trained: dict[str, Any]
) -> None:
    losses, norms = trained["references"]["neox-1"]
    for key, expected in (("loss", losses), ("grad_norm", norms)):
        error = worst(curve(trained["folder"], f"{mode}-{recompute}", *shape, key=key), expected)
        print(f"{mode}, recompute {recompute}, P={shape[0]} R={shape[1]}, {key}: {error:.1e}")
        assert error < TOLERANCE


@pytest.mark.parametrize("shape", SCHEDULED)
@pytest.mark.parametrize("recompute", ["true", "false"])
@pytest.mark.parametrize("mode", SCHEDULES)
def test_bits_do_not_depend_on_the_schedule_nor_on_recompute(
    mode: str, recompute: str, shape: tuple[int, int], trained: dict[str, Any]
) -> None:
    """Of P neither: the other runs with as many replicas are all one."""
    folder, (stages, replicas) = trained["folder"], shape
    for key in ("loss", "grad_norm"):
        found = curve(folder, f"{mode}-{recompute}", *shape, key=key)
        assert found == curve(folder, "gpipe-true", 2, replicas, key)
    _assert_same(
        _weights(folder, f"{mode}-{recompute}", stages, replicas),
        _weights(folder, "gpipe-true", 2, replicas),
    )


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_bits_do_not_depend_on_the_buckets(zero_stage: int, trained: dict[str, Any]) -> None:
    folder, name = trained["folder"], f"buckets-{zero_stage}"
    one = _weights(folder, "one-row", 1, 2)
    for stages in (1, 2):
        for key in ("loss", "grad_norm"):
            assert curve(folder, name, stages, 2, key) == curve(folder, "one-row", 1, 2, key)
        _assert_same(_weights(folder, name, stages, 2), one)


def test_weights_after_training_are_the_same_in_every_shape(trained: dict[str, Any]) -> None:
    """All stages' weights, put together, of P = 4 against P = 1: the same bits."""
    _assert_same(_weights(trained["folder"], "gptj-1", 1), _weights(trained["folder"], "gptj-1", 4))


@pytest.mark.parametrize("shape", LISTED_SHAPES)
def test_bits_do_not_depend_on_how_layers_are_listed(
    shape: tuple[int, int], trained: dict[str, Any]
) -> None:
    folder, (stages, replicas) = trained["folder"], shape
    assert _split(folder, "listed", *shape) == list(map(int, LISTED[stages].split(",")))
    for key in ("loss", "grad_norm"):
        found = curve(folder, "listed", *shape, key=key)
        assert found == curve(folder, "gptj-1", 1, replicas, key)
    if replicas == 1:
        _assert_same(_weights(folder, "listed", stages), _weights(folder, "gptj-1", 1))


def test_bits_do_not_depend_on_what_auto_chooses(trained: dict[str, Any]) -> None:
    folder = trained["folder"]
    splits = [_split(folder, "weighed", stages, 1) for stages in (1, 2)]
    assert splits == [[LAYERS], [5, 2]]
    for key in ("loss", "grad_norm"):
        one, two = (curve(folder, "weighed", stages, 1, key) for stages in (1, 2))
        assert one == two
    _assert_same(_weights(folder, "weighed", 2), _weights(folder, "weighed", 1))


def _split(folder: Path, name: str, stages: int, replicas: int) -> list[int]:
    """As the checkpoint tells it."""
    meta = run_folder(folder, name, stages, replicas) / str(UPDATES) / "meta.json"
    counts: list[int] = json.loads(meta.read_text())["num_layers"]
    return counts


def _assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    assert len(some) == len(others) > 0
    assert all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _weights(folder: Path, name: str, stages: int, replicas: int = 1) -> list[Tensor]:
    step = run_folder(folder, name, stages, replicas) / str(UPDATES)
    parts = [
        torch.load(step / f"prank_{stage}_checkpoint.pt", weights_only=True)
        for stage in range(stages)
    ]
    return [tensor for part in parts for tensor in part.values()]
