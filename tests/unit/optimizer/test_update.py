"""Tests how an update changes a weight, and after how many skipped updates a run gives up."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from comm.backends.single_process import SingleProcessCommunicator
from optimizer.build import build_optimizer
from optimizer.loss_scaler import ConstantScale
from optimizer.update import UpdateResult, UpdateStep

NOMINAL, SCALE, GRADIENT = 40, 8.0, 3.0


class Descent:
    """Algorithm that subtracts lr * gradient; a weight of 0 becomes -gradient, because lr is 1."""

    kind = "descent"

    def empty_state(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def step(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        *_: object,
        factor: float,
        lr: float,
        **__: object,
    ) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.sub_(gradient, alpha=lr * factor)


def make_updater(
    weight: nn.Parameter | None = None, *, max_norm: float = math.inf, max_skipped: int = 3
) -> UpdateStep:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1)) if weight is None else weight
    optimizer = build_optimizer(
        model, Descent(), precision="fp32", weight_decay=0.0, replicas=SingleProcessCommunicator()
    )
    optimizer.gradients.buffer.views["weight"].fill_(GRADIENT)
    return UpdateStep(
        optimizer,
        ConstantScale(SCALE, may_skip=True),
        schedule=lambda update: 1.0,
        nominal_tokens=NOMINAL,
        max_grad_norm=max_norm,
        max_skipped=max_skipped,
    )


def apply(updater: UpdateStep, *, tokens: int = NOMINAL, bad: str = "") -> UpdateResult:
    """Applies an update; `bad` names the number that is not finite: "loss" or "gradient"."""
    norm = math.inf if bad == "gradient" else GRADIENT**2
    return updater.apply(norm, num_trained_tokens=tokens, losses_are_finite=bad != "loss")


@pytest.mark.parametrize("tokens", [NOMINAL, 10])
def test_gradients_are_over_the_tokens_that_were_trained(tokens: int) -> None:
    """Backward divides gradients by 40; the update replaces 40 by the number of trained tokens."""
    weight = nn.Parameter(torch.zeros(1))
    outcome = apply(make_updater(weight), tokens=tokens)
    expected = GRADIENT / SCALE * 40 / tokens
    assert outcome.grad_norm == pytest.approx(expected, rel=1e-6)
    assert weight.item() == pytest.approx(-expected, rel=1e-6)


def test_clipping_is_of_the_exact_gradient() -> None:
    """If 10 of 40 tokens are trained, the mean gradient of these 10, with norm 1.5, is clipped."""
    weight = nn.Parameter(torch.zeros(1))
    outcome = apply(make_updater(weight, max_norm=0.5), tokens=10)
    assert outcome.grad_norm == pytest.approx(1.5, rel=1e-6)
    assert weight.item() == pytest.approx(-0.5, rel=1e-5)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_skip_changes_nothing(bad: str) -> None:
    weight = nn.Parameter(torch.zeros(1))
    assert apply(make_updater(weight), bad=bad) == UpdateResult(1.0, None, SCALE)
    assert weight.item() == 0.0


def test_skips_count_in_a_row() -> None:
    updater = make_updater(max_skipped=2)
    for bad in ("loss", "", "gradient"):
        apply(updater, bad=bad)
        assert not updater.has_given_up
    apply(updater, bad="loss")
    assert updater.has_given_up


def test_skips_count_on_after_a_resume() -> None:
    before, after = make_updater(), make_updater()
    for _ in range(2):
        apply(before, bad="gradient")
    after.load_state(before.state())
    assert not after.has_given_up
    apply(after, bad="gradient")
    assert after.has_given_up


def test_a_run_that_gave_up_counts_anew() -> None:
    before, after = make_updater(), make_updater()
    for _ in range(3):
        apply(before, bad="gradient")
    assert before.has_given_up
    after.load_state(before.state())
    for _ in range(2):
        apply(after, bad="gradient")
    assert not after.has_given_up
