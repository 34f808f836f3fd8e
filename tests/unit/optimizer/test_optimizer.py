"""Tests parts of an update against torch, transformers, bitsandbytes and tables made by hand."""

import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from comm.backends.single_process import SingleProcessCommunicator
from comm.topology import Topology
from optimizer.adam import Adam, Algorithm
from optimizer.adam_8bit import Adam8bit
from optimizer.loss_scaler import DynamicScale, make_scaler
from optimizer.lr_schedule import learning_rate
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.saved_state import SavedState
from optimizer.state_dict import collect_state, restore_state
from optimizer.update import clip_factor, squared_norms
from tests.support.gradients import gradients_of, make_optimizer, make_parameters

ALONE = Topology(0, 1, 1)
SCHEDULES = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda sgd, warmup, total: get_constant_schedule_with_warmup(sgd, warmup),
}


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (10, 10), (1, 1), (0, 1)])
def test_schedule_is_that_of_transformers(kind: str, warmup: int, total: int) -> None:
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = SCHEDULES[kind](theirs, warmup, total)
    for update in range(total):
        ours = rate(update, kind=kind, warmup=warmup, total=total)
        assert ours == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        theirs.step()
        scheduler.step()


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_schedule_ends_at_the_lowest_rate(kind: str) -> None:
    rates = [rate(update, kind=kind, warmup=2, total=12, lowest=0.1) for update in range(13)]
    assert rates[:3] == [0.0, 0.15, pytest.approx(0.3)]
    assert rates[12] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[7] == pytest.approx(0.2), "the middle of the decay"


def rate(update: int, *, kind: str, warmup: int, total: int, lowest: float = 0.0) -> float:
    return learning_rate(update, kind=kind, warmup=warmup, total=total, peak=0.3, lowest=lowest)


def test_scale_moves_by_the_rule() -> None:
    """The scales equal a list made by hand; an update has an overflow (o) or has none (c)."""
    scaler = DynamicScale(initial=16.0, minimum=4.0, window=3, hysteresis=2)
    verdicts = "ooooccocccococ"
    scales = [16, 8, 4, 4, 4, 4, 4, 4, 4, 8, 8, 8, 4, 4]
    for number, (what, expected) in enumerate(zip(verdicts, scales, strict=True)):
        scaler.update(overflow=what == "o")
        assert scaler.scale == expected, f"after entry {number}"


def test_scale_restores() -> None:
    one = DynamicScale(initial=16.0, minimum=1.0, window=3, hysteresis=2)
    for overflow in (True, False, False):
        one.update(overflow=overflow)
    two = DynamicScale(initial=1.0, minimum=1.0, window=3, hysteresis=2)
    two.load_state(one.state())
    for overflow in (True, False, False, False, True, True):
        one.update(overflow=overflow)
        two.update(overflow=overflow)
        assert one.scale == two.scale


def test_a_constant_scale_stays() -> None:
    scaler = make_scaler("fp16", constant=64.0, initial=1, minimum=1, window=1, hysteresis=1)
    scaler.update(overflow=True)
    assert (scaler.scale, scaler.may_skip) == (64.0, True)
    for precision in ("fp32", "bf16"):
        scaler = make_scaler(precision, constant=0, initial=8, minimum=1, window=1, hysteresis=1)
        assert (scaler.scale, scaler.may_skip) == (1.0, False)


def set_gradients(optimizer: MixedPrecisionOptimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for _, view in optimizer.gradients.reported():
        view.copy_(torch.randn(view.shape, generator=generator))


def bitsandbytes_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    import bitsandbytes  # this import takes seconds

    return bitsandbytes.optim.AdamW8bit(groups, eps=1e-6)


THEIRS = {
    Adam: lambda groups: torch.optim.AdamW(groups, eps=1e-6, fused=True),
    Adam8bit: bitsandbytes_adam,
}


@pytest.mark.parametrize("algorithm", THEIRS)
def test_adam_is_that_of_its_library_to_the_bit(algorithm: type[Algorithm]) -> None:
    """Weights equal those of torch or bitsandbytes; lr rises, weight decay is for matrices only.

    The gradients have a factor of 0.5, by which a multiplication is exact.
    """
    shapes = {"big.weight": (80, 100), "small.bias": (7,), "small.weight": (5, 3)}
    parameters, twin = make_parameters(shapes), make_parameters(shapes)
    ours = make_optimizer(parameters, algorithm=algorithm())
    decays = [{"params": [p], "weight_decay": 0.1 * (p.dim() == 2)} for p in twin.values()]
    theirs = THEIRS[algorithm](decays)
    for step in range(5):
        set_gradients(ours, step)
        for name, view in ours.gradients.reported():
            twin[name].grad = view * 0.5
        for group in theirs.param_groups:
            group["lr"] = 0.01 * (step + 1)
        ours.step(lr=0.01 * (step + 1), factor=0.5)
        theirs.step()
    if algorithm is Adam8bit:
        assert ours.moments["big.weight"]["state1"].dtype == torch.uint8
    assert all(torch.equal(parameters[name], twin[name]) for name in twin)


def test_adam_is_the_formula_in_fp64() -> None:
    """Weights equal AdamW's formula in fp64; gradients are 100 times too large, so 0.01 scales."""
    parameters = make_parameters()
    exact = {name: p.detach().double() for name, p in parameters.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in exact.items()} for _ in range(2))
    optimizer = make_optimizer(parameters)
    for step in range(1, 6):
        set_gradients(optimizer, step)
        lr = 0.003 * step
        for name, view in optimizer.gradients.reported():
            g, w = view.double(), exact[name]
            view.mul_(100.0)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            change = first[name] / (1 - 0.9**step)
            change /= (second[name] / (1 - 0.999**step)).sqrt() + 1e-6
            exact[name] = w - lr * (change + (0.1 * w if w.dim() == 2 else 0.0))
        optimizer.step(lr=lr, factor=0.01)
    for name, parameter in parameters.items():
        assert torch.allclose(parameter.double(), exact[name], rtol=1e-6, atol=1e-7)
        found = optimizer.moments[name]
        for part, expected in (("exp_avg", first), ("exp_avg_sq", second)):
            assert torch.allclose(found[part].double(), expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-36, 1e-41])
def test_adam_accepts_gradients_near_the_largest_number(factor: float) -> None:
    """The kernel divides by 1 / factor, which fp32 cannot hold if the factor is below 3e-39."""
    parameters = make_parameters({"weight": (2, 2)})
    before, optimizer = parameters["weight"].detach().clone(), make_optimizer(parameters)
    optimizer.gradients.buffer.views["weight"].fill_(1e38)
    optimizer.step(lr=0.01, factor=factor)
    change = before * (1 - 0.001) - parameters["weight"].detach()
    assert torch.allclose(change, torch.full_like(change, 0.01), rtol=1e-3)


def test_8bit_adam_makes_one_optimizer_for_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights share one bitsandbytes optimizer; a new one per weight and step would be slow."""
    import bitsandbytes

    made = Mock(wraps=bitsandbytes.optim.AdamW8bit)
    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", made)
    optimizer = make_optimizer(make_parameters(), algorithm=Adam8bit())
    for step in range(2):
        set_gradients(optimizer, step)
        optimizer.step(lr=0.01, factor=1.0)
    assert made.call_count == 1


def test_a_missing_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        Adam8bit()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("algorithm", [Adam, Adam8bit])
def test_offload_gives_the_same_numbers(dtype: torch.dtype, algorithm: type[Algorithm]) -> None:
    plain, moved = make_parameters(), make_parameters()
    one = make_optimizer(plain, algorithm=algorithm(), dtype=dtype)
    two = make_optimizer(moved, algorithm=algorithm(), dtype=dtype, offload=True)
    for step in range(4):
        for optimizer in (one, two):
            set_gradients(optimizer, step)
            optimizer.step(lr=0.01, factor=0.5)
    assert all(torch.equal(plain[name], moved[name]) for name in plain)
    assert all(p.dtype == dtype for p in moved.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_steps_fp32_masters(dtype: torch.dtype) -> None:
    """Masters equal the weights of an fp32 run; fp16 or bf16 weights equal the rounded masters."""
    full, half = make_parameters(), make_parameters()
    one, two = make_optimizer(full), make_optimizer(half, dtype=dtype)
    for step in range(30):
        for optimizer in (one, two):
            set_gradients(optimizer, step)
            optimizer.step(lr=1e-4, factor=1.0)
    for name, parameter in full.items():
        assert torch.equal(two.masters[name], parameter.data), "equal to the fp32 run's weights"
        assert torch.equal(half[name], parameter.to(dtype))


def test_half_precision_gradients_add_up_in_fp32() -> None:
    layer = nn.Linear(3, 5)
    optimizer = make_optimizer(dict(layer.named_parameters()), dtype=torch.bfloat16)
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    expected = torch.zeros(5, 3)
    for scale in (1.0, 2.0**-10):
        made = torch.autograd.grad((layer(x) * scale).sum(), layer.weight)[0]
        expected += made.float()
        (layer(x) * scale).sum().backward()
    assert torch.equal(dict(optimizer.gradients.reported())["weight"], expected)
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("algorithm", [Adam, Adam8bit])
def test_state_restores_to_the_bit(dtype: torch.dtype, algorithm: type[Algorithm]) -> None:
    straight, parted = make_parameters(), make_parameters()
    one = make_optimizer(straight, algorithm=algorithm(), dtype=dtype)
    two = make_optimizer(parted, algorithm=algorithm(), dtype=dtype)
    for step in range(3):
        for optimizer in (one, two):
            set_gradients(optimizer, step)
            optimizer.step(lr=0.01, factor=1.0)
    state = collect_state(two, SingleProcessCommunicator(), ALONE)
    kept = {name: nn.Parameter(p.detach().float()) for name, p in parted.items()}
    resumed = make_optimizer(kept, algorithm=algorithm(), dtype=dtype)
    same = {name: name for name in resumed.names}
    states = [SavedState(Path("state"), state, names=same, saved_names=same)]
    restore_state(resumed, states, SingleProcessCommunicator(), ALONE, updates=3)
    for optimizer in (one, resumed):
        set_gradients(optimizer, 9)
        optimizer.step(lr=0.01, factor=1.0)
    assert all(torch.equal(straight[name], kept[name]) for name in straight)


def test_norm_and_clipping_are_torchs() -> None:
    optimizer = make_optimizer(make_parameters())
    set_gradients(optimizer, 3)
    twin = make_parameters()
    for name, view in optimizer.gradients.reported():
        twin[name].grad = view.clone()
    views = dict(optimizer.gradients.reported())
    expected = nn.utils.clip_grad_norm_(twin.values(), 0.5).item()
    norm = sum(squared_norms(list(views.values()))) ** 0.5
    assert norm == pytest.approx(expected, rel=1e-6)
    for name, parameter in twin.items():
        assert parameter.grad is not None
        assert torch.allclose(views[name] * clip_factor(norm, 0.5), parameter.grad, rtol=1e-6)
    assert clip_factor(norm, float("inf")) == 1.0
    assert clip_factor(0.1, 0.5) == 1.0


def test_gradients_live_in_the_flat_buffer() -> None:
    layer = nn.Linear(3, 5)
    gradients = gradients_of(layer).buffer
    x = torch.randn(2, 3)
    for _ in range(2):
        layer(x).sum().backward()
    assert torch.allclose(gradients.views["weight"], 2 * x.sum(0).expand(5, 3))
    total = sum(view.sum().item() for view in gradients.views.values())
    assert gradients.flat.sum().item() == pytest.approx(total, rel=1e-5, abs=1e-5)
    start = gradients.flat.data_ptr()
    assert all((view.data_ptr() - start) % 64 == 0 for view in gradients.views.values())
