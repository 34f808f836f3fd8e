"""Tests that training over every backend gives the same losses and weights as over gloo.

The tests run on CPU. A double replaces NCCL's communicator in the cupy_nccl backend; gloo groups
replace torch's NCCL groups in the nccl backend. The results can be compared bit for bit, because a
gradient is a sum over at most two replicas, and the order of two numbers does not change their sum.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cupy.cuda import nccl

from monitor.metrics import read_metrics
from tests.support.cases import Case, meet_at, run_folder, train_cases, weights_of
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.fp16_twin import LAYERS, ROWS, TOKENS
from tests.support.launcher import run_ranks
from tests.support.mixed import model_flags, rows_of_a_replica
from tests.support.models import make_shards
from tests.support.nccl_double import Traffic, nccl_double
from tests.support.torch_nccl_double import gloo_for_nccl

BACKENDS = ("gloo", "cupy_nccl", "nccl")
SHAPES = {"fp32": [(2, 2), (4, 1)], "bf16": [(2, 2)], "fp16": [(2, 2)]}
RUNS = [(precision, shape) for precision, shapes in SHAPES.items() for shape in shapes]
UPDATES = 3
HIDDEN, MICROBATCH = 32, 1
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": "true", "zero-stage": 1},
    "fp16": {"fp16": "true", "gradient-accumulate-step": 2, "total-steps": 2 * UPDATES},
}


def flags(folder: Path) -> dict[str, Any]:
    own = flags_of(f"""
        --seq-length {TOKENS} --micro-batch-size {MICROBATCH} --recompute false
        --total-steps {UPDATES} --warmup-steps 1 --lr 1e-3 --weight-decay 0.1
    """)
    return model_flags(folder) | own | {"batch-size": rows_of_a_replica}


def train_over_each(
    rank: int, world_size: int, url: str, meetings: dict[str, Any], folder: Path
) -> Traffic:
    """Trains all cases over every backend; returns how many bytes this rank's NCCL double sent."""
    cases = [
        Case(name, flags(folder) | changes, shapes=SHAPES[name])
        for name, changes in PRECISIONS.items()
    ]
    with nccl_double() as traffic, gloo_for_nccl() as groups:
        for backend, shapes in meetings.items():
            train_cases(rank, world_size, url, shapes, cases, folder / backend, backend)
            assert bool(traffic) == (backend != "gloo"), "CuPy's backend sends the first"
            assert bool(groups) == (backend == "nccl"), "only torch's backend makes them"
    return traffic


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sequence[Traffic]]:
    folder = tmp_path_factory.mktemp("backends")
    write_jsonl(folder / "a.jsonl", make_texts(60, seed=1))
    make_shards(folder, "model", "gptneox", {"num_hidden_layers": LAYERS})
    meetings = {backend: meet_at(SHAPES["fp32"]) for backend in BACKENDS}
    return folder, run_ranks(4, train_over_each, meetings, folder, deadline=400.0)


@pytest.mark.parametrize(("precision", "shape"), RUNS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_training_is_that_over_gloo(
    backend: str, precision: str, shape: tuple[int, int], trained: tuple[Path, Sequence[Traffic]]
) -> None:
    folder, _ = trained
    runs = [run_folder(folder / each, precision, *shape) for each in ("gloo", backend)]
    expected, found = (read_metrics(run / "metrics.jsonl") for run in runs)
    for key in ("loss", "grad_norm", "loss_scale", "lr"):
        assert [line.get(key) for line in found] == [line.get(key) for line in expected], key
    assert len({line["loss"] for line in found}) == len(found) >= UPDATES, "the loss changes"
    weights = [weights_of(folder / each, precision, *shape) for each in ("gloo", backend)]
    assert weights[0] == weights[1]


def test_activations_and_gradients_went_through_the_double(
    trained: tuple[Path, Sequence[Traffic]],
) -> None:
    """The double carries stages' messages in the compute type, and replicas' gradients in fp32."""
    total = sum((traffic for traffic in trained[1]), Counter[tuple[str, int]]())
    elements = 2 * ROWS * TOKENS * HIDDEN * UPDATES  # between two neighbours, both ways
    # Each direction of a link begins with a message of one number: two pipelines of 2, one of 4.
    opened = 2 * 2 + 2 * 3
    assert total["send", nccl.NCCL_FLOAT32] == 4 * (elements + 3 * elements + opened)
    assert total["send", nccl.NCCL_BFLOAT16] == 2 * elements
    assert total["send", nccl.NCCL_FLOAT16] == 2 * 2 * elements
    assert total["allReduce", nccl.NCCL_FLOAT32] > 0, "gradients of fp32 and fp16 runs"
    assert total["reduce", nccl.NCCL_FLOAT32] > 0, "gradients to their owners"
    assert total["broadcast", nccl.NCCL_BFLOAT16] > 0, "weights from their owners"
