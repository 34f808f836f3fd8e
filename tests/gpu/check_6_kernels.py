"""Check 6: kernels before and after a change, with the shapes of Pythia-1.4B and GPT-J-6B.

It compares the forms of a weight gradient, of the head, of GELU, of AdamW and of attention. Times
have no limit, because they depend on the machine. Rows that must hold compare results: the faster
form must be as exact as the other. On a CPU the same code runs with tiny shapes, and its times
mean nothing.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.optim.adamw import adamw

from modules.layers import lm_head
from modules.layers.linear import Linear, attach_grad_buffer
from tests.gpu.report import CheckReport, Options, run_check
from tests.gpu.timing import CallTime, time_calls
from tests.support.gradients import gradients_of

_MIB = 2**20
_CHUNKS = (64 * _MIB, 512 * _MIB, 1024 * _MIB)
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
}
_CPU_NOTE = "means nothing on a CPU"


@dataclass(frozen=True)
class ModelShape:
    """The shapes of a model's kernels for one microbatch."""

    name: str
    tokens: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


PYTHIA = ModelShape("Pythia-1.4B", 2048, 2048, 8192, 16, 50304)
GPTJ = ModelShape("GPT-J-6B", 2048, 4096, 16384, 16, 50400)
TINY = ModelShape("tiny", 32, 64, 128, 2, 96)


class Bench:
    """Times that become rows of the report; `device` and `dtype` are those of the tensors."""

    def __init__(self, report: CheckReport, options: Options) -> None:
        self.report, self.is_cuda = report, options.is_cuda
        self.device = torch.device("cuda", 0) if options.is_cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if options.is_cuda else torch.float32
        self._generator = torch.Generator(self.device).manual_seed(6)

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns normal random numbers."""
        numbers = torch.randn(shape, generator=self._generator, device=self.device)
        return numbers.to(dtype or self.dtype)

    def time(
        self, name: str, call: Callable[[], object], before: CallTime | None = None
    ) -> CallTime:
        """Measures a call, and compares it with `before`."""
        repeats = {"repeats": 7, "inner": 4} if self.is_cuda else {"repeats": 1, "inner": 1}
        took = time_calls(call, self.device, **repeats)
        ratio = f"{before.median / took.median:.2f} times as fast; " if before is not None else ""
        note = f"{ratio}{took.spread}" if self.is_cuda else _CPU_NOTE
        self.report.measure(name, took.median, "ms", note)
        return took

    def attempt(self, name: str, part: Callable[[], object]) -> None:
        """Runs a part of the check; an exception fails a row and does not end the check."""
        try:
            part()
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            self.report.expect(f"{name}: no {type(error).__name__}", False, note=text)
        if self.is_cuda:
            torch.cuda.empty_cache()


def check(report: CheckReport, options: Options) -> None:
    """Compares all forms, for both models on CUDA and for a tiny one on a CPU."""
    bench = Bench(report, options)
    shapes = (PYTHIA, GPTJ) if options.is_cuda else (TINY,)
    for shape in shapes:
        bench.attempt("weight gradient", partial(weight_gradient, bench, shape))
        bench.attempt("head", partial(head, bench, shape))
        bench.attempt("GELU", partial(activation, bench, shape))
    bench.attempt("AdamW", partial(updates, bench))
    for shape in shapes:  # last, because cuDNN can take long
        bench.attempt("attention", partial(attention, bench, shape))


def weight_gradient(bench: Bench, shape: ModelShape) -> None:
    """Adds dW = gradient.T @ x to an fp32 sum: rounded product and sum, or one call of addmm."""
    gradient = bench.random(shape.tokens, shape.inner).t()
    x = bench.random(shape.tokens, shape.hidden)
    total = bench.random(shape.inner, shape.hidden, dtype=torch.float32)
    name = f"{shape.name}: weight gradient"

    def two_calls(out: Tensor) -> Tensor:
        return out.add_(gradient @ x)

    def one_call(out: Tensor) -> Tensor:
        if not bench.is_cuda:  # CPUs lack the form with out_dtype
            return torch.addmm(out, gradient, x, out=out)
        return torch.addmm(out, gradient, x, out_dtype=torch.float32, out=out)

    exact = total + gradient.float() @ x.float()
    errors = [_error(form(total.clone()), exact) for form in (two_calls, one_call)]
    before = bench.time(f"{name}, product and sum", lambda: two_calls(total))
    bench.time(f"{name}, one addmm", lambda: one_call(total), before)
    note = f"relative error; product and sum: {errors[0]:.2g}"
    bench.report.expect(
        f"{name}, addmm is as exact", errors[1] <= max(errors[0], 1e-6), errors[1], "", note
    )


def head(bench: Bench, shape: ModelShape) -> None:
    """Computes the head's loss and gradients in chunks of several sizes."""
    module = _Head(shape.hidden, shape.vocabulary).to(bench.device, bench.dtype)
    with torch.no_grad():
        module.embed_out.weight.copy_(bench.random(shape.vocabulary, shape.hidden) * 0.02)
    gradients = gradients_of(module)
    attach_grad_buffer(module, gradients.buffer)
    x = bench.random(1, shape.tokens, shape.hidden).requires_grad_()
    labels = torch.randint(shape.vocabulary, (1, shape.tokens), device=bench.device)
    losses, before = [], None
    for size in _CHUNKS if bench.is_cuda else (1024, 4096):

        def step() -> Tensor:
            loss = module.loss(x, labels, scale=1.0)
            loss.backward()
            return loss.detach()

        with patch.object(lm_head, "chunk_bytes", return_value=size):
            losses.append(step())
            name = f"{shape.name}: head, logits of {size / _MIB:.4g} MiB"
            took = bench.time(name, step, before)
        before = before or took
    with torch.no_grad():
        logits = module(x).flatten(0, 1).float()
        exact = cross_entropy(logits, labels.flatten(), reduction="sum")
    error = max(_error(loss, exact) for loss in losses)
    name = f"{shape.name}: head, the loss of all chunk sizes is torch's"
    bench.report.expect(name, error < 1e-4, error, "", "relative error")


class _Head(lm_head.Head):
    """A head without a bias, as GPT-NeoX has."""

    norm_name, projection_name = "final_layer_norm", "embed_out"

    def __init__(self, hidden: int, vocabulary: int) -> None:
        super().__init__()
        self.final_layer_norm = nn.LayerNorm(hidden)
        self.embed_out = Linear(hidden, vocabulary, bias=False)


def activation(bench: Bench, shape: ModelShape) -> None:
    """Computes gelu_new, forward and backward, as eight kernels and as one."""
    x = bench.random(1, shape.tokens, shape.inner).requires_grad_()
    d_out = bench.random(1, shape.tokens, shape.inner)
    exact_x = x.detach().double().requires_grad_()
    exact = torch.autograd.grad(gelu_new(exact_x), exact_x, d_out.double())[0]

    def gradient(form: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.autograd.grad(form(x), x, d_out)[0]

    def fused(x: Tensor) -> Tensor:
        return gelu(x, approximate="tanh")

    name = f"{shape.name}: gelu_new"
    errors = [_error(gradient(form), exact) for form in (gelu_new, fused)]
    before = bench.time(f"{name}, eager", lambda: gradient(gelu_new))
    bench.time(f"{name}, fused", lambda: gradient(fused), before)
    note = f"relative error of the gradient; eager: {errors[0]:.2g}"
    bench.report.expect(
        f"{name}, fused is as exact", errors[1] <= max(errors[0], 1e-6), errors[1], "", note
    )
    if bench.is_cuda:
        for how, form in (("eager", gelu_new), ("fused", fused)):
            begin = torch.cuda.memory_allocated()
            out = form(x)
            kept = (torch.cuda.memory_allocated() - begin) / _MIB
            bench.report.measure(f"{name}, {how}: memory until backward", kept, "MiB")
            del out


def gelu_new(x: Tensor) -> Tensor:
    """Returns GELU's tanh approximation as transformers' `gelu_new` computes it."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3.0))))


def attention(bench: Bench, shape: ModelShape) -> None:
    """Computes causal attention, forward and backward, by each kernel of torch."""
    size = (1, shape.heads, shape.tokens, shape.head_size)
    query, key, value = (bench.random(*size).requires_grad_() for _ in range(3))
    d_out = bench.random(*size)

    def step(length: int = shape.tokens) -> Tensor:
        q, k, v = (tensor[:, :, :length] for tensor in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, query, d_out[:, :, :length])[0]

    name = f"{shape.name}: attention, heads of {shape.head_size}"
    choice = torch._fused_sdp_choice(query, key, value, is_causal=True)
    bench.report.measure(f"{name}, torch's choice", SDPBackend(choice).name)
    for kernel, backend in _BACKENDS.items() if bench.is_cuda else ():
        with sdpa_kernel(backend):
            try:
                step()
            except RuntimeError as error:
                text = " ".join(str(error).split())[:100]
                bench.report.measure(f"{name}, {kernel}", "not available", "", text)
                continue
            bench.time(f"{name}, {kernel}", step)
            lengths = range(shape.tokens // 2 + 8, shape.tokens // 2 + 8 + 4 * 8, 8)
            try:
                times = [_host_milliseconds(partial(step, length)) for length in lengths]
            except RuntimeError as error:
                text = " ".join(str(error).split())[:100]
                bench.report.measure(f"{name}, {kernel}: a new length", "not available", "", text)
                continue
            bench.report.measure(
                f"{name}, {kernel}: a new length", statistics.median(times), "ms", "with the host"
            )
    if not bench.is_cuda:
        bench.time(f"{name}, torch's choice", step)


def _host_milliseconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


def updates(bench: Bench) -> None:
    """Updates weights by fused AdamW, with a call for each weight or with one call for all."""
    layers, hidden = (24, 1024) if bench.is_cuda else (2, 16)
    shapes: list[tuple[int, ...]] = [
        (3 * hidden, hidden),
        (hidden, hidden),
        (4 * hidden, hidden),
        (hidden, 4 * hidden),
    ]
    shapes += [(hidden,)] * 8

    weights = [bench.random(*s, dtype=torch.float32) for s in shapes * layers]
    gradients = [bench.random(*s, dtype=torch.float32) for s in shapes * layers]
    each = [weights, gradients, *([torch.zeros_like(w) for w in weights] for _ in range(2))]
    together = [[tensor.clone() for tensor in tensors] for tensors in each]

    def one_by_one() -> None:
        for weight, gradient, first, second in zip(*each, strict=True):
            step = torch.tensor(10.0, device=bench.device)
            _adamw([weight], [gradient], [first], [second], [step])

    def all_at_once() -> None:
        steps = torch.full((len(together[0]),), 10.0, device=bench.device).unbind()
        _adamw(together[0], together[1], together[2], together[3], steps)

    one_by_one()
    all_at_once()
    same = all(map(torch.equal, each[0], together[0]))
    count = sum(weight.numel() for weight in each[0])
    name = f"AdamW of {count / 1e6:.3g} M weights in {len(each[0])} tensors"
    before = bench.time(f"{name}, one by one", one_by_one)
    bench.time(f"{name}, one call", all_at_once, before)
    bench.report.expect(f"{name}: the same weights", same, note="equal bits")


def _adamw(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[Tensor],
) -> None:
    adamw(
        list(weights),
        list(gradients),
        list(first),
        list(second),
        [],
        list(steps),
        fused=True,
        amsgrad=False,
        beta1=0.9,
        beta2=0.999,
        lr=1e-3,
        weight_decay=0.01,
        eps=1e-6,
        maximize=False,
    )


def _error(actual: Tensor, exact: Tensor) -> float:
    """Returns the root mean square of the difference, divided by that of `exact`."""
    difference = (actual.double() - exact.double()).square().mean().sqrt()
    return float(difference / exact.double().square().mean().sqrt())


if __name__ == "__main__":
    run_check(check)
