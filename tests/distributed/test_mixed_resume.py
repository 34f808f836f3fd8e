"""Resume in every precision, with every optimizer, offloaded and sharded or not: the same bits.

A run goes on from a copy of an uninterrupted one as it was at its middle step, and must end in the
same metrics and the same files. In fp16 the updates just before and just after the save are
skipped, so that the scale, its hysteresis and the count of clean updates must come back too.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from monitor.metrics import read_metrics
from tests.support.cases import Case, meet_at, run_folder, train_cases
from tests.support.data import make_texts, write_jsonl
from tests.support.launcher import run_ranks
from tests.support.mixed import model_flags, rows_of_a_replica
from tests.support.models import make_shards
from tests.support.parity import worst
from tests.support.poison import Overflow

LAYERS, STEPS, SAVED = 4, 6, 3
PRECISIONS, OPTIMIZERS, SWITCHES = ("fp16", "bf16", "fp32"), ("adam", "8bit-adam"), (False, True)
KINDS = list(product(PRECISIONS, OPTIMIZERS))
PLACES = list(product(SWITCHES, SWITCHES))  # offload, sharded
TOLERANCE = 1e-5  # what the project promises in fp32 for another R


def name_of(precision: str, optimizer: str, offload: bool, sharded: bool) -> str:
    return f"{precision}-{optimizer}{'-offload' * offload}{'-zero' * sharded}"


def flags(
    folder: Path, precision: str, optimizer: str, offload: bool, sharded: bool
) -> dict[str, Any]:
    return {
        **model_flags(folder),
        "seq-length": 16,
        "batch-size": rows_of_a_replica,
        "recompute": "false",
        "total-steps": STEPS,
        "checkpoint-steps": SAVED,
        "lr": 2e-3,
        "weight-decay": 0.1,
        "optimizer": optimizer,
        "fp16": str(precision == "fp16"),
        "bf16": str(precision == "bf16"),
        "loss-scale-window": 2,
        "use-offload": str(offload),
        "zero-stage": int(sharded),
    }


def cases_of_four(folder: Path) -> list[Case]:
    """Every combination in P=2 R=2: the whole run, and one that goes on from its middle."""
    cases = []
    for combination in product(PRECISIONS, OPTIMIZERS, SWITCHES, SWITCHES):
        name, own = name_of(*combination), flags(folder, *combination)
        hook = Overflow(3, (SAVED, SAVED + 1)) if combination[0] == "fp16" else None
        middle = (f"{name}-2-2", SAVED)
        cases += [Case(name, own, hook), Case(f"{name}-resumed", own, hook, middle)]
    for precision, (before, after) in product(PRECISIONS, ((False, True), (True, False))):
        hook = Overflow(3, (SAVED, SAVED + 1)) if precision == "fp16" else None
        middle = (f"{name_of(precision, 'adam', before, before)}-2-2", SAVED)
        own = flags(folder, precision, "adam", after, after)
        cases.append(Case(changed_name(precision, after), own, hook, middle))
    return [case._replace(shapes=[(2, 2)]) for case in cases]


def changed_name(precision: str, after: bool) -> str:
    return f"{precision}-{'to' if after else 'from'}-zero-and-offload"


OTHER_REPLICAS = [1, 4]


def cases_of_one_stage(folder: Path) -> list[Case]:
    """Saved with two replicas, resumed with one and with four."""
    cases = []
    for optimizer, sharded in product(OPTIMIZERS, SWITCHES):
        own = flags(folder, "fp32", optimizer, False, sharded)
        name = f"{optimizer}{'-zero' * sharded}"
        cases.append(Case(name, own, shapes=[(1, 2)]))
        cases.append(
            Case(
                f"{name}-resumed",
                own,
                after=(f"{name}-1-2", SAVED),
                shapes=[(1, replicas) for replicas in OTHER_REPLICAS],
            )
        )
    return cases


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs."""
    path = tmp_path_factory.mktemp("mixed-resume")
    write_jsonl(path / "a.jsonl", make_texts(60, seed=1))
    changes = {"num_hidden_layers": LAYERS, "intermediate_size": 128}  # 8-bit from 4096 numbers on
    make_shards(path, "model", "gptneox", changes)
    cases = cases_of_one_stage(path) + cases_of_four(path)
    for world_size, shapes in {2: [(1, 2)], 1: [(1, 1)], 4: [(1, 4), (2, 2)]}.items():
        run_ranks(world_size, train_cases, meet_at(shapes), cases, path, deadline=400.0)
    return path


def metrics(folder: Path, name: str, stages: int = 2, replicas: int = 2) -> list[dict[str, Any]]:
    """Without what a clock tells, and without what tells that a run was resumed."""
    lines = read_metrics(run_folder(folder, name, stages, replicas) / "metrics.jsonl")
    left_out = ("step_seconds", "tokens_per_second", "resumed")
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines]


def state(folder: Path, name: str, step: int = STEPS) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of two stages, by file and name."""
    found: dict[str, Tensor] = {}
    for stage, part in product(range(2), ("checkpoint", "optimizer")):
        path = run_folder(folder, name, 2, 2) / str(step) / f"prank_{stage}_{part}.pt"
        flatten(f"{stage}.{part}", torch.load(path, weights_only=True), found)
    return found


def flatten(prefix: str, value: Any, found: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        found[prefix] = value
    elif isinstance(value, dict):
        for key, inner in value.items():
            flatten(f"{prefix}.{key}", inner, found)


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert not different, different


@pytest.mark.parametrize(("offload", "sharded"), PLACES)
@pytest.mark.parametrize(("precision", "optimizer"), KINDS)
def test_a_resumed_run_ends_in_the_same_bits(
    precision: str, optimizer: str, offload: bool, sharded: bool, folder: Path
) -> None:
    name = name_of(precision, optimizer, offload, sharded)
    lines = metrics(folder, name)
    assert metrics(folder, f"{name}-resumed") == lines
    assert_same(state(folder, f"{name}-resumed"), state(folder, name))
    resumed = read_metrics(run_folder(folder, f"{name}-resumed", 2, 2) / "metrics.jsonl")
    assert [line["step"] for line in resumed if line.get("resumed")] == [SAVED + 1]
    skipped = [line["step"] for line in lines if line["grad_norm"] is None]
    assert skipped == ([SAVED, SAVED + 1] if precision == "fp16" else [])
    scales = [32768.0, 32768.0, 65536.0, 65536.0, 32768.0, 32768.0]
    assert [line.get("loss_scale") for line in lines] == (
        scales if precision == "fp16" else [None] * STEPS
    )


@pytest.mark.parametrize(("offload", "sharded"), PLACES[1:])
@pytest.mark.parametrize(("precision", "optimizer"), KINDS)
def test_where_state_lies_does_not_show(
    precision: str, optimizer: str, offload: bool, sharded: bool, folder: Path
) -> None:
    plain = name_of(precision, optimizer, False, False)
    moved = name_of(precision, optimizer, offload, sharded)
    assert metrics(folder, moved) == metrics(folder, plain)
    for step in (SAVED, STEPS):
        assert_same(state(folder, moved, step), state(folder, plain, step))


@pytest.mark.parametrize("after", SWITCHES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_state_may_move_when_a_run_resumes(precision: str, after: bool, folder: Path) -> None:
    plain, changed = name_of(precision, "adam", False, False), changed_name(precision, after)
    assert metrics(folder, changed) == metrics(folder, plain)
    assert_same(state(folder, changed), state(folder, plain))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_checkpoint_holds_what_its_kind_needs(precision: str, folder: Path) -> None:
    compute = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    for optimizer in OPTIMIZERS:
        tensors = state(folder, name_of(precision, optimizer, True, True))
        weights = {k: v for k, v in tensors.items() if "checkpoint" in k}
        masters = {k: v for k, v in tensors.items() if ".masters." in k}
        assert {v.dtype for v in weights.values()} == {compute}
        assert len(masters) == (0 if precision == "fp32" else len(weights))
        assert all(v.dtype == torch.float32 for v in masters.values())
        for key, master in masters.items():
            assert torch.equal(
                master.to(compute), weights[key.replace("optimizer.masters", "checkpoint")]
            )
        codes = [v for v in tensors.values() if v.dtype == torch.uint8]
        assert bool(codes) == (optimizer == "8bit-adam")


@pytest.mark.parametrize("replicas", OTHER_REPLICAS)
@pytest.mark.parametrize("name", ["adam", "adam-zero", "8bit-adam", "8bit-adam-zero"])
def test_another_number_of_replicas_goes_on(name: str, replicas: int, folder: Path) -> None:
    """Sums over replicas are rounded otherwise; 8-bit moments now and then by a whole code."""
    whole = [line["loss"] for line in metrics(folder, name, 1, 2)]
    resumed = [line["loss"] for line in metrics(folder, f"{name}-resumed", 1, replicas)]
    assert len(resumed) == STEPS
    assert resumed[:SAVED] == whole[:SAVED]
    error = worst(resumed, whole)
    print(f"{name}, from R=2 to R={replicas}: {error:.1e}")
    assert error < TOLERANCE * (1 if name.startswith("adam") else 10)
