"""Tests the head's chunked loss: its memory, and its numbers against torch's cross entropy."""

import copy
import math
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from modules.layers.linear import Linear, attach_grad_buffer
from modules.layers.lm_head import IGNORED, Head
from modules.registry import MODELS
from planning.memory.fake_model import tensors_without_memory
from tests.support.gradients import gradients_of
from tests.support.memory import peak_bytes
from tests.support.models import make_hf

ROWS, TOKENS, HIDDEN, VOCABULARY = 3, 7, 32, 97
# Tokens of a chunk, if a microbatch has 21: one, divisors and other numbers, all, more.
CHUNKS = [1, 3, 7, 8, 20, 21, 50]
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float16, torch.bfloat16)}
# Roundings of the computation (product, softmax, gradient, product, norm's backward), each of a sum
# whose terms exceed it: a random sum of 97 such terms loses 8, which is doubled twice.
ROUNDINGS = 32


class Given(NamedTuple):
    """Loss, and gradients by the name of the parameter; the name `x` means the head's input."""

    loss: float
    gradients: dict[str, Tensor]


def make_head(family: str, dtype: torch.dtype) -> Head:
    config = make_hf(family).config
    torch.manual_seed(3)
    head = MODELS[family].load().make_head(config)
    assert isinstance(head, Head)
    for parameter in head.parameters():
        nn.init.normal_(parameter, 0.3, 0.3)
    return head.to(dtype)


def material(dtype: torch.dtype, ignored: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    x = torch.randn(ROWS, TOKENS, HIDDEN).to(dtype)
    labels = torch.randint(0, VOCABULARY, (ROWS, TOKENS))
    if ignored == "some":
        labels[0, 2:5] = labels[2, 6] = labels[1] = IGNORED
    elif ignored == "all":
        labels[:] = IGNORED
    return x, labels


def ours(head: Head, x: Tensor, labels: Tensor, scale: float, chunk: int) -> Given:
    gradients = gradients_of(head)
    attach_grad_buffer(head, gradients.buffer)
    gradients.begin_update(1)
    x = x.clone().requires_grad_()
    with patch("modules.layers.lm_head.chunk_bytes", return_value=4 * VOCABULARY * chunk):
        loss = head.loss(x, labels, scale=scale)
    torch.autograd.backward(loss)
    gradients.finish_exchange()  # every parameter was counted once
    assert x.grad is not None
    return Given(loss.item(), {**gradients.buffer.views, "x": x.grad})


def reference(head: Head, x: Tensor, labels: Tensor, scale: float) -> Given:
    """Computes the expected result of `ours` by autograd, in fp64, on all logits at once."""
    wide = copy.deepcopy(head).double()
    for module in wide.modules():
        if isinstance(module, Linear):
            module.grad_buffer = None
    wide.zero_grad()
    x = x.double().requires_grad_()
    logits = wide(x).flatten(0, 1)
    loss = functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    torch.autograd.backward(loss * scale)
    gradients = {n: p.grad for n, p in wide.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return Given(loss.item(), {**gradients, "x": x.grad})


CASES = [  # every pair of values
    (family, dtype, chunk, ignored)
    for i, family in enumerate(["gptj", "gptneox"])
    for j, dtype in enumerate(EPS)
    for k, chunk in enumerate(CHUNKS)
    for n, ignored in enumerate(["none", "some", "all"])
    if (j + k) % 3 == n and (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("family", "dtype", "chunk", "ignored"), CASES)
def test_loss_and_gradients_are_torchs(
    family: str, dtype: torch.dtype, chunk: int, ignored: str
) -> None:
    head = make_head(family, dtype)
    x, labels = material(dtype, ignored)
    expected = reference(head, x, labels, 64.0)
    found = ours(head, x, labels, 64.0, chunk)
    tolerance = ROUNDINGS * EPS[dtype]
    assert found.loss == pytest.approx(expected.loss, rel=tolerance)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        worst = (found.gradients[name].double() - gradient).abs().max()
        assert worst <= tolerance * gradient.abs().max(), name
        assert (gradient.abs().max() == 0) == (ignored == "all")


@pytest.mark.parametrize("dtype", EPS)
def test_loss_without_gradients_is_the_same(dtype: torch.dtype) -> None:
    head, (x, labels) = make_head("gptj", dtype), material(dtype, "some")
    with (
        torch.no_grad(),
        patch("modules.layers.lm_head.chunk_bytes", return_value=4 * VOCABULARY * 8),
    ):
        alone = head.loss(x, labels, scale=1.0).item()
    assert alone == ours(head, x, labels, 1.0, 8).loss


def test_each_chunk_has_its_own_logits_alone() -> None:
    """The bits of the input's gradient in one chunk do not depend on the rows of other chunks."""
    head, (x, labels) = make_head("gptneox", torch.float32), material(torch.float32, "none")
    whole = ours(head, x, labels, 1.0, TOKENS).gradients["x"]
    one_row = ours(head, x[1:2], labels[1:2], 1.0, TOKENS).gradients["x"]
    assert torch.equal(whole[1:2], one_row)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_are_not_finite_show(dtype: torch.dtype, value: float) -> None:
    head, (x, labels) = make_head("gptj", dtype), material(dtype, "none")
    with torch.no_grad():
        head.projection.weight[int(labels[2, 3])] = value
    found = ours(head, x, labels, 1.0, 8)
    assert not math.isfinite(found.loss)
    assert not found.gradients["lm_head.weight"].isfinite().all()


def test_logits_beyond_fp16_show() -> None:
    """The loss is not finite if finite weights give logits beyond the range of fp16."""
    head, (x, labels) = make_head("gptj", torch.float16), material(torch.float16, "none")
    with torch.no_grad():
        head.projection.weight[5] = 40000.0
        head.get_parameter("ln_f.bias").fill_(3.0)
    assert not math.isfinite(ours(head, x, labels, 1.0, 8).loss)


# ---- memory ----

WIDE, LONG, NARROW = 4096, 512, 16  # vocabulary, tokens, hidden size: logits are the largest tensor


class WideHead(Head):
    """A head in which only the logits need much memory."""

    def __init__(self, dtype: torch.dtype, vocabulary: int = WIDE) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(NARROW), Linear(NARROW, vocabulary, bias=False)
        self.to(dtype)

    @property
    def final_norm(self) -> nn.LayerNorm:
        return self.first

    @property
    def projection(self) -> Linear:
        return self.second


def peak_of(dtype: torch.dtype, chunks: int, *, training: bool) -> float:
    """Returns (peak memory of the loss) / (size of all fp32 logits); `training` adds backward."""
    head = WideHead(dtype)
    buffer = gradients_of(head).buffer
    attach_grad_buffer(head, buffer)
    x = torch.randn(1, LONG, NARROW).to(dtype).requires_grad_()
    labels = torch.randint(0, WIDE, (1, LONG))

    def run() -> None:
        with torch.set_grad_enabled(training), buffer.deferring(None):
            loss = head.loss(x, labels, scale=1.0)
        if training:
            torch.autograd.backward(loss)

    with patch("modules.layers.lm_head.chunk_bytes", return_value=4 * WIDE * LONG // chunks):
        run()  # allocates everything that is made only once
        _, peak = peak_bytes(run)
    return peak / (4 * WIDE * LONG)


# Memory besides logits, in units of the logits in fp32: activations, LONG x NARROW each, of which
# norm, loss and backward hold at most 8; and the weight, WIDE x NARROW, which half precision copies
# to fp32 for an fp32 product, and so does its gradient.
SMALL = 8 * NARROW / WIDE + 2 * NARROW / LONG


@pytest.mark.parametrize("chunks", [1, 2, 4, 16])
@pytest.mark.parametrize("training", [True, False])
def test_fp32_holds_one_chunk_of_logits(chunks: int, training: bool) -> None:
    """At the peak, memory holds the logits of one chunk, and no second copy of these logits."""
    assert 1 / chunks <= peak_of(torch.float32, chunks, training=training) <= 1 / chunks + SMALL


@pytest.mark.parametrize("chunks", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_few_chunks_of_logits(dtype: torch.dtype, chunks: int) -> None:
    """At the peak, memory holds the logits of one chunk twice: in fp32 and in half precision."""
    assert peak_of(dtype, chunks, training=True) <= 1.5 / chunks + SMALL


@pytest.mark.parametrize(("device", "megabytes"), [("cpu", 64), ("meta", 512)])
def test_a_gpu_has_larger_chunks_which_the_plan_counts(device: str, megabytes: int) -> None:
    """A chunk's logits have 64 MiB on a CPU and 512 MiB on a GPU, for which "meta" stands.

    On GPUs, chunks of 64 MiB made products of 333 tokens, which are too small to be fast.
    """
    vocabulary, tokens = 50304, 6000  # 1.1 GiB of logits
    head = WideHead(torch.float32, vocabulary)
    with tensors_without_memory() as live, torch.device(device):
        layers: list[nn.Module] = [head.final_norm, head.projection]
        for layer in layers:
            for name, parameter in list(layer.named_parameters()):
                layer.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        attach_grad_buffer(head, gradients_of(head).buffer)
        x = torch.zeros(1, tokens, NARROW)
        labels = torch.zeros(1, tokens, dtype=torch.int64)
        live.reset_peak()
        begin = live.current[device]
        head.loss(x, labels, scale=1.0)
        peak = (live.peak[device] - begin) / 2**20
    assert megabytes - 0.2 <= peak <= megabytes + 5  # 5: activations, and sums for each token
