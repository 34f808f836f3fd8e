"""Checks of an update: AdamW and clipping against fp64, mixed precision, offload.

Between two updates a GPU gets a sleep, before the gradients are written and after each step. So
the weights are wrong if offload does not wait for a copy.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from comm.backends.single_process import SingleProcessCommunicator
from common.tensors import DTYPES
from optimizer.adam import Adam
from optimizer.build import build_optimizer
from optimizer.loss_scaler import make_scaler
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.update import UpdateStep, squared_norms
from tests.gpu.numerics_host import queue_sleep
from tests.gpu.numerics_layers import draw
from tests.gpu.numerics_parity import ALLOWED, HALF, rms
from tests.gpu.report import CheckReport, Options
from tests.support.models import TOLERANCE

SHAPES = {"matrix": (70, 90), "bias": (3000,), "embedding": (2000, 30), "scale": (1500,)}
UPDATES, DECAY, MAX_NORM = 6, 0.1, 1.0
SCALE, NOMINAL, TRAINED = 1024.0, 100, 90  # loss scale, nominal and trained tokens
BETAS, EPS = (0.9, 0.999), 1e-6
SLEEP = 0.02  # seconds


def learning_rate(update: int) -> float:
    """Returns a rate that rises from 0 for a warm-up of three updates."""
    return 1e-2 * min(1.0, update / 3)


def gradients_at(update: int) -> dict[str, Tensor]:
    """Returns the gradients of an update in fp64; updates with an even number are clipped."""
    size = 3.0 if update % 2 == 0 else 1e-3
    return {
        name: draw(100 * update + number, *shape) * size
        for number, (name, shape) in enumerate(SHAPES.items())
    }


class OurUpdates:
    """A model of four weights, with the optimizer and the update step of a run."""

    def __init__(self, device: torch.device, precision: str, *, offload: bool = False) -> None:
        values = {name: draw(n, *shape).float() for n, (name, shape) in enumerate(SHAPES.items())}
        self.model = nn.ParameterDict({n: nn.Parameter(v.to(device)) for n, v in values.items()})
        self.device = device
        self.optimizer: MixedPrecisionOptimizer = build_optimizer(
            self.model,
            Adam(),
            precision=precision,
            weight_decay=DECAY,
            offload=offload,
            replicas=SingleProcessCommunicator(),
        )
        scaler = make_scaler("fp16", constant=SCALE, initial=1, minimum=1, window=9, hysteresis=1)
        self.step = UpdateStep(
            self.optimizer,
            scaler,
            schedule=learning_rate,
            nominal_tokens=NOMINAL,
            max_grad_norm=MAX_NORM,
            max_skipped=9,
        )

    def run(self) -> list[float]:
        """Makes all updates; returns the gradient norms."""
        norms = []
        for update in range(UPDATES):
            scaled = {n: g * (SCALE * TRAINED / NOMINAL) for n, g in gradients_at(update).items()}
            on_device = {name: gradient.to(self.device) for name, gradient in scaled.items()}
            queue_sleep(self.device, SLEEP)
            self.write(on_device)
            queue_sleep(self.device, SLEEP)
            norm = self.apply(sum(squared_norms(list(self.gradients().values()))))
            queue_sleep(self.device, SLEEP)
            assert norm is not None
            norms.append(norm)
        return norms

    def gradients(self) -> dict[str, Tensor]:
        return dict(self.optimizer.gradients.reported())

    def write(self, gradients: dict[str, Tensor]) -> None:
        for name, gradient in self.gradients().items():
            gradient.copy_(gradients[name])

    def apply(self, squared_norm: float) -> float | None:
        result = self.step.apply(squared_norm, num_trained_tokens=TRAINED, losses_are_finite=True)
        return result.grad_norm

    def masters(self) -> dict[str, Tensor]:
        return {name: master.cpu().clone() for name, master in self.optimizer.masters.items()}

    def weights(self) -> dict[str, Tensor]:
        return {name: self.optimizer.weight_of(name).cpu() for name in SHAPES}


def exact_updates() -> tuple[dict[str, Tensor], list[float]]:
    """Computes the updates in fp64 by the formulas of AdamW and of clipping.

    Returns the weights and the gradient norms.
    """
    weights = {n: draw(i, *shape).float().double() for i, (n, shape) in enumerate(SHAPES.items())}
    first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    norms = []
    for update in range(UPDATES):
        gradients, lr = gradients_at(update), learning_rate(update)
        norms.append(math.sqrt(sum(g.square().sum().item() for g in gradients.values())))
        clip = min(1.0, MAX_NORM / (norms[-1] + 1e-6))
        for name, weight in weights.items():
            gradient = gradients[name] * clip
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            mean = first[name] / (1 - BETAS[0] ** (update + 1))
            variance = second[name] / (1 - BETAS[1] ** (update + 1))
            decay = DECAY if weight.dim() == 2 else 0.0
            weight -= lr * (mean / (variance.sqrt() + EPS) + decay * weight)
    return weights, norms


def torch_updates(device: torch.device) -> dict[str, Tensor]:
    """Makes the updates in fp32 with torch's plain AdamW and torch's clipping."""
    weights = {
        name: nn.Parameter(draw(number, *shape).float().to(device))
        for number, (name, shape) in enumerate(SHAPES.items())
    }
    groups: list[dict[str, Any]] = [
        {"params": [weight], "weight_decay": DECAY if weight.dim() == 2 else 0.0}
        for weight in weights.values()
    ]
    adamw = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, foreach=False, fused=False)
    for update in range(UPDATES):
        for name, gradient in gradients_at(update).items():
            weights[name].grad = gradient.float().to(device)
        nn.utils.clip_grad_norm_(weights.values(), MAX_NORM)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(update)
        adamw.step()
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def check_update(report: CheckReport, options: Options) -> None:
    """Compares updates with fp64; an error is at most 1.5 times that of torch's plain AdamW."""
    device = torch.device(options.device)
    exact, norms = exact_updates()
    plain = torch_updates(device)
    runs = {
        (precision, offload): OurUpdates(device, precision, offload=offload)
        for precision in DTYPES
        for offload in (False, True)
    }
    for (precision, offload), run in runs.items():
        title = f"AdamW {precision}{', offload' * offload}"
        found = run.run()
        error = max(abs(a - b) / b for a, b in zip(found, norms, strict=True))
        report.expect(f"{title}: gradient norm", error <= TOLERANCE, error / TOLERANCE, ALLOWED)
        masters = run.masters()
        for name in SHAPES:
            errors = [rms(weights[name].double() - exact[name]) for weights in (masters, plain)]
            value = errors[0] / errors[1] / HALF
            report.expect(f"{title}: {name}", value <= 1, value, ALLOWED)
        rounded = {name: master.to(DTYPES[precision]) for name, master in masters.items()}
        _expect_equal(report, f"{title}: compute copies = masters", run.weights(), rounded)
        zero = {name: torch.zeros_like(g) for name, g in run.gradients().items()}
        _expect_equal(report, f"{title}: gradients become 0", run.gradients(), zero)
        if offload and not options.is_cuda:  # the same kernel computes both
            title += " = none"
            _expect_equal(report, title, masters, runs[precision, False].masters())
    _check_skip(report, runs["fp16", False])


def _check_skip(report: CheckReport, run: OurUpdates) -> None:
    before = run.masters()
    run.write({name: torch.full(shape, math.inf) for name, shape in SHAPES.items()})
    norm = run.apply(math.inf)
    report.expect("overflow: the update is skipped", norm is None)
    _expect_equal(report, "overflow: the masters stay", run.masters(), before)


def _expect_equal(
    report: CheckReport, title: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]
) -> None:
    """Adds a row with the largest difference, which must be 0."""
    assert ours.keys() == theirs.keys()
    holds = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    errors = [(ours[n].double() - theirs[n].double()).abs().max().item() for n in theirs]
    report.expect(title, holds, max(errors), "", "the same bits" if holds else "")
