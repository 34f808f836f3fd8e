"""The update's parts against torch and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import get_linear_schedule_with_warmup

from data_parallel.flat_gradients import FlatGradients
from optimizer.adam import Adam
from optimizer.agreement import clip_factor, squared_norms
from optimizer.lr_schedule import linear_schedule


@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 10), (10, 10), (1, 1), (0, 1)])
def test_schedule_is_that_of_transformers(warmup: int, total: int) -> None:
    theirs = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_linear_schedule_with_warmup(theirs, warmup, total)
    for update in range(total):
        ours = linear_schedule(update, warmup=warmup, total=total, peak=0.3)
        assert ours == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        theirs.step()
        scheduler.step()


def make_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"0.weight": (5, 3), "0.bias": (5,), "1.norm.weight": (3,), "1.weight": (7, 3)}
    return {k: nn.Parameter(torch.randn(s, generator=generator)) for k, s in shapes.items()}


def set_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        gradient = torch.randn(parameter.shape, generator=generator)
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            parameter.grad.copy_(gradient)


def test_adam_is_adamw_with_decay_on_matrices_alone() -> None:
    """Against the formula itself, in fp64: 5 steps of fp32 stay within a few roundings."""
    parameters = make_parameters()
    twin = {name: p.detach().double() for name, p in parameters.items()}
    first = {name: torch.zeros_like(p) for name, p in twin.items()}
    second = {name: torch.zeros_like(p) for name, p in twin.items()}
    ours = Adam(parameters, weight_decay=0.1)
    for step in range(1, 6):
        set_gradients(parameters, step)
        lr = 0.01 * step
        ours.step(lr)
        for name, p in twin.items():
            gradient = parameters[name].grad
            assert gradient is not None
            g = gradient.double()
            if p.dim() == 2:
                p.mul_(1 - lr * 0.1)
            first[name].mul_(0.9).add_(g, alpha=0.1)
            second[name].mul_(0.999).add_(g * g, alpha=0.001)
            root = (second[name] / (1 - 0.999**step)).sqrt()
            p.sub_(lr * (first[name] / (1 - 0.9**step)) / (root + 1e-6))
    for name, p in twin.items():
        assert torch.allclose(parameters[name].double(), p, rtol=1e-5, atol=1e-6), name


def test_state_restores_to_the_bit() -> None:
    straight, parted = make_parameters(), make_parameters()
    one, two = Adam(straight, weight_decay=0.1), Adam(parted, weight_decay=0.1)
    for step in range(3):
        for parameters, adam in ((straight, one), (parted, two)):
            set_gradients(parameters, step)
            adam.step(0.01)
    state = dict(two.state())
    resumed = Adam(parted, weight_decay=0.1)
    resumed.load_state(state)
    assert resumed.updates == 3
    for parameters, adam in ((straight, one), (parted, resumed)):
        set_gradients(parameters, 9)
        adam.step(0.01)
    assert all(torch.equal(straight[name], parted[name]) for name in straight)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_state_of_another_model_is_refused(change: str) -> None:
    parameters = make_parameters()
    state = Adam(parameters, weight_decay=0.0).state()
    moment = dict(state["exp_avg"])
    if change == "missing":
        del moment["0.bias"]
    elif change == "extra":
        moment["2.bias"] = torch.zeros(1)
    else:
        moment["0.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"exp_avg.*"):
        Adam(parameters, weight_decay=0.0).load_state({**state, "exp_avg": moment})


def test_norm_and_clipping_are_torchs() -> None:
    parameters = make_parameters()
    gradients = FlatGradients(parameters.values())
    set_gradients(parameters, 3)
    twin = make_parameters()
    set_gradients(twin, 3)
    expected = nn.utils.clip_grad_norm_(twin.values(), 0.5).item()
    norm = sum(squared_norms(gradients.views)) ** 0.5
    assert norm == pytest.approx(expected, rel=1e-6)
    gradients.scale_(clip_factor(norm, 0.5))
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        expected_grad = twin[name].grad
        assert expected_grad is not None
        assert torch.allclose(parameter.grad, expected_grad, rtol=1e-6)
    assert clip_factor(norm, float("inf")) == 1.0
    assert clip_factor(0.1, 0.5) == 1.0


def test_gradients_live_in_the_flat_buffer() -> None:
    layer = nn.Linear(3, 5)
    gradients = FlatGradients(layer.parameters())
    x = torch.randn(2, 3)
    for _ in range(2):
        layer(x).sum().backward()
    assert torch.allclose(gradients.views[0], 2 * x.sum(0).expand(5, 3))
    assert gradients.buffer.sum().item() == pytest.approx(
        sum(view.sum().item() for view in gradients.views), rel=1e-5
    )
    assert all(view.data_ptr() % 64 == gradients.buffer.data_ptr() % 64 for view in gradients.views)
