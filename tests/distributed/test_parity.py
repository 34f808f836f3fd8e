"""Every pipeline x data shape against the Hugging Face model trained in one process.

The reference sees the same blocks, in plain torch: one optimizer, one loss, no code of ours but
what reads the blocks. 20 updates, at a rate where the loss moves.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline_parallel.schedule.schedules import SCHEDULES
from tests.support.cases import Case, curve, meet_at, run_folder, train_cases, weights_of
from tests.support.data import make_texts, write_jsonl
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from tests.support.parity import (
    DROPOUT,
    LAYERS,
    MODELS_TRIED,
    TOLERANCE,
    UPDATES,
    blocks,
    flags,
    reference,
    worst,
)
from tests.support.schedule_cases import SCHEDULED, schedule_cases

CLIPPED = 0.1  # a gradient norm that every update exceeds
SHAPES = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2)], 8: [(4, 2)]}
ALL_SHAPES = [shape for shapes in SHAPES.values() for shape in shapes]


# A head as heavy as three and a half of the blocks: two stages that are even have 5 and 2 of them.
HEAVY_HEAD = ("gptneox", {"num_hidden_layers": LAYERS, "vocab_size": 1000})
LISTED = {2: "1,6", 4: "1,3,1,2"}
LISTED_SHAPES = [(2, 1), (2, 2), (4, 1)]


def listed_layers(stages: int, replicas: int) -> str:
    return LISTED[stages]


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
        weights_of(folder, f"{mode}-{recompute}", stages, replicas),
        weights_of(folder, "gpipe-true", 2, replicas),
    )


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_bits_do_not_depend_on_the_buckets(zero_stage: int, trained: dict[str, Any]) -> None:
    folder, name = trained["folder"], f"buckets-{zero_stage}"
    one = weights_of(folder, "one-row", 1, 2)
    for stages in (1, 2):
        for key in ("loss", "grad_norm"):
            assert curve(folder, name, stages, 2, key) == curve(folder, "one-row", 1, 2, key)
        _assert_same(weights_of(folder, name, stages, 2), one)


def test_weights_after_training_are_the_same_in_every_shape(trained: dict[str, Any]) -> None:
    """All stages' weights, put together, of P = 4 against P = 1: the same bits."""
    _assert_same(
        weights_of(trained["folder"], "gptj-1", 1, 1), weights_of(trained["folder"], "gptj-1", 4, 1)
    )


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
        _assert_same(weights_of(folder, "listed", stages, 1), weights_of(folder, "gptj-1", 1, 1))


def test_bits_do_not_depend_on_what_auto_chooses(trained: dict[str, Any]) -> None:
    folder = trained["folder"]
    splits = [_split(folder, "weighed", stages, 1) for stages in (1, 2)]
    assert splits == [[LAYERS], [5, 2]]
    for key in ("loss", "grad_norm"):
        one, two = (curve(folder, "weighed", stages, 1, key) for stages in (1, 2))
        assert one == two
    _assert_same(weights_of(folder, "weighed", 2, 1), weights_of(folder, "weighed", 1, 1))


def _split(folder: Path, name: str, stages: int, replicas: int) -> list[int]:
    """As the checkpoint tells it."""
    meta = run_folder(folder, name, stages, replicas) / str(UPDATES) / "meta.json"
    counts: list[int] = json.loads(meta.read_text())["num_layers"]
    return counts


def _assert_same(some: list[bytes], others: list[bytes]) -> None:
    assert len(some) == len(others) > 0
    assert some == others
