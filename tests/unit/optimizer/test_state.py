"""Tests that wrong or non-finite optimizer state is an error that names the file and weight."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from comm.backends.single_process import SingleProcessCommunicator
from comm.topology import Topology
from optimizer.adam_8bit import Adam8bit
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.saved_state import SavedState
from optimizer.state_dict import collect_state, finite_weights, restore_state
from tests.support.gradients import make_optimizer, make_parameters

ALONE, FILE, UPDATES = Topology(0, 1, 1), Path("7/prank_3_optimizer.pt"), 5
State = dict[str, Any]
ZEROS = torch.zeros(5)

# The damage to a valid fp16 state, and the words of the error after the file's name.
WRONG: dict[str, tuple[Callable[[State], object], str]] = {
    "missing": (lambda s: s["exp_avg"].pop("0.bias"), "exp_avg: 0.bias is missing"),
    "a part missing": (lambda s: s.pop("masters"), "masters: 0.weight is missing"),
    "another shape": (
        lambda s: s["exp_avg"].update({"0.bias": torch.zeros(4)}),
        "exp_avg: 0.bias is (4,) torch.float32, expected (5,) torch.float32",
    ),
    "another type": (
        lambda s: s["masters"].update({"0.bias": torch.zeros(5).half()}),
        "masters: 0.bias is (5,) torch.float16, expected (5,) torch.float32",
    ),
    "no tensor": (lambda s: s["exp_avg"].update({"0.bias": 1}), "exp_avg: 0.bias is int"),
    "no dict": (lambda s: s.update(exp_avg=[1]), "exp_avg is list, expected a dict"),
    "unknown weight": (lambda s: s["exp_avg"].update({"9": ZEROS}), "exp_avg: 9 unexpected"),
    "unknown part": (lambda s: s.update(momentum={"0": ZEROS}), "momentum: 0 unexpected"),
    "another algorithm": (lambda s: s.update(kind="sgd"), "kind is 'sgd', expected 'adam'"),
    "no algorithm": (lambda s: s.pop("kind"), "kind is None, expected 'adam'"),
    "other updates": (lambda s: s.update(updates=4), "updates is 4, expected 5"),
    "NaN in a master": (
        lambda s: s["masters"]["1.weight"][2, 3].fill_(float("nan")),
        "masters: 1.weight holds a value that is not finite",
    ),
    "inf in a moment": (
        lambda s: s["exp_avg_sq"]["0.bias"][1].fill_(float("inf")),
        "exp_avg_sq: 0.bias holds a value that is not finite",
    ),
}


def restore(optimizer: MixedPrecisionOptimizer, state: State) -> None:
    names = {name: name for name in optimizer.names}
    saved = SavedState(FILE, state, names=names, saved_names=names)
    restore_state(optimizer, [saved], SingleProcessCommunicator(), ALONE, updates=UPDATES)


def good_state(optimizer: MixedPrecisionOptimizer) -> State:
    optimizer.updates = UPDATES
    return collect_state(optimizer, SingleProcessCommunicator(), ALONE)


@pytest.mark.parametrize("wrong", WRONG)
def test_state_that_is_not_this_runs_is_refused(wrong: str) -> None:
    spoil, words = WRONG[wrong]
    optimizer = make_optimizer(make_parameters(), dtype=torch.float16)
    state = good_state(optimizer)
    restore(optimizer, state)
    spoil(state)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{FILE}: {words}')}"):
        restore(optimizer, state)


def test_fp32_has_no_masters_to_restore() -> None:
    half = good_state(make_optimizer(make_parameters(), dtype=torch.float16))
    with pytest.raises(ValueError, match=r"masters: .* unexpected"):
        restore(make_optimizer(make_parameters()), half)


def test_8bit_maxima_must_be_finite() -> None:
    optimizer = make_optimizer(make_parameters(), algorithm=Adam8bit())
    state = good_state(optimizer)
    state["absmax1"]["1.weight"][0] = float("nan")
    with pytest.raises(ValueError, match=r"absmax1: 1\.weight holds a value that is not finite"):
        restore(optimizer, state)


@pytest.mark.parametrize("place", ["weight", "master", "moment"])
def test_what_a_checkpoint_would_refuse_is_found(place: str) -> None:
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, dtype=torch.float16)
    assert finite_weights(optimizer) == [True] * 4
    tensor = {
        "weight": parameters["0.bias"].data,
        "master": optimizer.masters["0.bias"],
        "moment": optimizer.moments["0.bias"]["exp_avg"],
    }[place]
    tensor[3] = float("inf")
    assert finite_weights(optimizer) == [True, False, True, True]
