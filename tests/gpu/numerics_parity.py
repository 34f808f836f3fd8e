"""Checks of complete models: against Hugging Face, documents, dropout, equal bits."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from common.tensors import DTYPES
from modules.attention.packed_documents import PackedDocuments
from modules.layers.selective import MODES
from tests.gpu.numerics_models import (
    DROPOUT,
    FAMILIES,
    KEYS,
    SCALE,
    OurRun,
    Result,
    Text,
    cast,
    deterministic,
    hf_result,
    make_model,
    make_text,
    our_model,
    our_result,
)
from tests.gpu.report import CheckReport, Options
from tests.support.models import TOLERANCE, difference

HALF = 1.5  # in half precision: allowed error / Hugging Face's own error
ALLOWED = "of allowed"  # the unit of error / allowed error
# Of published models; 64 and 256 are those of neighbours of qwen3 (Llama 3.2, Gemma).
HEAD_SIZES = {"gptj": (64, 128, 256), "gptneox": (64, 80, 96, 128, 256), "qwen3": (64, 128, 256)}


def head_sizes(options: Options, family: str) -> tuple[int, ...]:
    """Returns the head sizes to check: the smallest and the largest if the check is quick."""
    sizes = HEAD_SIZES[family]
    return (sizes[0], sizes[-1]) if options.quick else sizes


def seq_len(options: Options) -> int:
    """Returns the length of rows; on a GPU it is longer than the tiles of attention's kernels."""
    if options.is_cuda:
        return 333
    return 40 if options.quick else 130


def check_fp32(report: CheckReport, options: Options) -> None:
    """Compares loss and gradients in fp32 with Hugging Face's: complete rows, then documents.

    The runs also cover recompute and zb-h1's split backward.
    """
    device, modes = torch.device(options.device), list(MODES.values())
    for family in FAMILIES:
        for number, size in enumerate(head_sizes(options, family)):
            theirs = make_model(family, size, device)
            for documents in (False, True):
                text = make_text(device, seq_len(options), documents=documents)
                run = OurRun(recompute=modes[number % len(modes)], splits=documents)
                ours = our_result(family, theirs, text, run)
                reference = hf_result(family, theirs, text, alone=True)
                title = f"fp32 {family}, head {size}{', documents' * documents}"
                error = abs(ours.loss - reference.loss) / reference.loss
                report.expect(f"{title}: loss", error <= TOLERANCE, error / TOLERANCE, ALLOWED)
                name, error = worst_gradient(ours.gradients, reference.gradients)
                holds = error <= TOLERANCE
                report.expect(f"{title}: gradients", holds, error / TOLERANCE, ALLOWED, name)


def worst_gradient(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[str, float]:
    """Returns the name of the gradient with the largest `difference`, and this difference."""
    assert ours.keys() == theirs.keys(), "both sides have the same weights"
    return max(((name, difference(ours[name], theirs[name])) for name in theirs), key=_size)


def check_half(report: CheckReport, options: Options) -> None:
    """Compares errors in half precision with the errors of Hugging Face's model.

    The reference is Hugging Face's model in fp64 with the same rounded weights.
    """
    device = torch.device(options.device)
    for precision in ("bf16", "fp16"):
        for family in FAMILIES:
            sizes = head_sizes(options, family)
            if options.quick or (precision == "fp16" and not options.is_cuda):
                sizes = sizes[:1]  # Hugging Face's model in fp16 is slow on a CPU
            for size in sizes:
                for documents in (False, True):
                    text = make_text(device, seq_len(options), documents=documents)
                    title = f"{precision} {family}, head {size}{', documents' * documents}"
                    _compare_half(report, title, family, size, text, precision)


def _compare_half(
    report: CheckReport, title: str, family: str, size: int, text: Text, precision: str
) -> None:
    half = cast(make_model(family, size, text.token_ids.device), DTYPES[precision])
    ours = our_result(family, half, text, OurRun(precision))
    theirs = hf_result(family, half, text, scale=SCALE[precision])
    reference = hf_result(family, cast(half, torch.float64), text)
    assert theirs.token_losses is not None
    assert reference.token_losses is not None
    # The mean of errors is at most their root mean square.
    allowed = HALF * rms(theirs.token_losses - reference.token_losses)
    value = abs(ours.loss - reference.loss) / allowed
    report.expect(f"{title}: loss", value <= 1, value, ALLOWED)
    name, value = worst_ratio(ours, theirs, reference)
    report.expect(f"{title}: gradients", value <= 1, value, ALLOWED, name)


def rms(errors: Tensor) -> float:
    return errors.double().square().mean().sqrt().item()


def worst_ratio(ours: Result, theirs: Result, reference: Result) -> tuple[str, float]:
    """Returns the kind of weight with the largest error / allowed error, and this value.

    The errors of a kind of weight (for example all layers' mlp.fc_in.bias) are relative to the norm
    of each gradient.
    """
    ratios = {}
    for kind in {name.partition(".")[2] for name in reference.gradients}:
        names = [name for name in reference.gradients if name.partition(".")[2] == kind]
        squares = [
            sum(_relative_error(result, reference, name) ** 2 for name in names)
            for result in (ours, theirs)
        ]
        ratios[kind] = math.sqrt(squares[0] / squares[1]) / HALF
    return max(ratios.items(), key=_size)


def _relative_error(result: Result, reference: Result, name: str) -> float:
    exact = reference.gradients[name]
    return ((result.gradients[name] - exact).norm() / exact.norm()).item()


def check_dropout(report: CheckReport, options: Options) -> None:
    """Checks that recompute draws the same dropout masks, and that backward uses forward's masks.

    A CPU gives the same bits. On a GPU, attention's backward may add in any order: in fp32 the
    tolerance is the project's; in bf16 another order can change roundings, of relative size eps.
    """
    device = torch.device(options.device)
    for family in FAMILIES:
        theirs = make_model(family, 64, device, **DROPOUT[family])
        for documents in (False, True):
            text = make_text(device, seq_len(options), documents=documents)
            title = f"dropout {family}{', documents' * documents}"
            for precision in ("fp32", "bf16"):
                kept = our_result(family, theirs, text, OurRun(precision, dropout=True))
                allowed = TOLERANCE if precision == "fp32" else torch.finfo(torch.bfloat16).eps
                if not options.is_cuda:
                    allowed = 0.0
                for mode in ("full", "selective"):
                    run = OurRun(precision, recompute=mode, dropout=True)
                    name, error = worst_difference(our_result(family, theirs, text, run), kept)
                    note = f"allowed: {allowed:.2g}; {name if error else 'the same bits'}"
                    row = f"{title}, {precision}: recompute" + " selective" * (mode != "full")
                    report.expect(row, error <= allowed, error, "relative", note)
            _check_masks(report, title, family, text, theirs)


def worst_difference(ours: Result, theirs: Result) -> tuple[str, float]:
    """Returns "loss" or the name of a gradient: the one with the largest relative difference."""
    loss = "loss", abs(ours.loss - theirs.loss) / theirs.loss
    return max(loss, worst_gradient(ours.gradients, theirs.gradients), key=_size)


def _size(named: tuple[str, float]) -> tuple[bool, float]:
    """Returns a key for `max`: a value that is not finite is larger than all others."""
    return not math.isfinite(named[1]), named[1]


def _check_masks(report: CheckReport, title: str, family: str, text: Text, theirs: object) -> None:
    """Compares the gradient with the change of the loss along the gradient, with the same masks.

    The error of a central difference with step h is c h^2 + O(h^4): it is about a third of the
    change between the steps h and 2 h. The rounding error of a loss is below 2^-20 of the loss. A
    change above 1% means that the masks change between two calls.
    """
    device = text.token_ids.device
    result = our_result(family, theirs, text, OurRun(dropout=True))
    plain = our_result(family, theirs, text, OurRun())
    name, change = worst_gradient(result.gradients, plain.gradients)
    report.expect(f"{title}: it has an effect", change > 0.01, change, "relative", name)
    model = our_model(family, theirs, device)
    weights = dict(model.named_parameters())
    documents = None if text.doc_starts is None else PackedDocuments(text.doc_starts, device)

    def loss_at(step: float) -> float:
        for name, weight in weights.items():
            weight.add_(result.gradients[name], alpha=step)
        loss = model.loss(text.token_ids, text.labels, KEYS, scale=1.0, documents=documents)
        for name, weight in weights.items():
            weight.sub_(result.gradients[name], alpha=step)
        return loss.item() / text.num_trained

    exact = sum(gradient.square().sum().item() for gradient in result.gradients.values())
    step = 0.002 * result.loss / exact
    with torch.no_grad():
        slopes = [(loss_at(h) - loss_at(-h)) / (2 * h) for h in (step, 2 * step)]
    allowed = min(abs(slopes[1] - slopes[0]) + 2.0**-20 * result.loss / step, 0.01 * exact)
    value = abs(slopes[0] - exact) / allowed
    note = f"allowed: {allowed / exact:.2g} of the slope"
    report.expect(f"{title}: gradient = slope of the loss", value <= 1, value, ALLOWED, note)


def check_same_bits(report: CheckReport, options: Options) -> None:
    """Checks that two backward passes give the same bits under deterministic algorithms.

    Without them, the check only reports whether the bits differ.
    """
    device = torch.device(options.device)
    for family in FAMILIES:
        theirs = make_model(family, 64, device, **DROPOUT[family])
        text = make_text(device, seq_len(options), documents=True)
        for precision in ("fp32",) if options.quick else ("fp32", "bf16", "fp16"):
            for dropout in (True, False):
                run = OurRun(precision, dropout=dropout)
                title = f"two passes {precision} {family}{', dropout' * dropout}"
                with deterministic():
                    name, error = _twice(family, theirs, text, run)
                holds = error == 0
                note = "the same bits" if holds else name
                report.expect(f"{title}: deterministic", holds, error, "relative", note)
                name, error = _twice(family, theirs, text, run)
                note = "the same bits" if error == 0 else f"the bits differ: {name}"
                report.measure(f"{title}: not deterministic", error, "relative", note)


def _twice(family: str, theirs: object, text: Text, run: OurRun) -> tuple[str, float]:
    one, two = (our_result(family, theirs, text, run) for _ in range(2))
    return worst_difference(two, one)
