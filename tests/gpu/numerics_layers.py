"""Checks of rotary embeddings, attention and the head against fp64.

In fp32 and in half precision, an error is at most 1.5 times the error of the computation in Hugging
Face's models, in the same type and on the same device.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.tensors import DTYPES
from modules.attention.causal import causal_attention
from modules.attention.packed_documents import PackedDocuments
from modules.attention.varlen import has_varlen_kernel
from modules.layers.linear import attach_grad_buffer
from modules.layers.lm_head import IGNORED, Head
from modules.layers.rotary import rotate, rotation, split_and_rotate
from modules.registry import MODELS
from tests.gpu.numerics_models import ROWS, document_lengths
from tests.gpu.numerics_parity import ALLOWED, HALF, rms, seq_len
from tests.gpu.report import CheckReport, Options
from tests.support.documents import doc_starts_of, documents_in
from tests.support.gradients import gradients_of
from tests.support.models import TOLERANCE

HEADS = 3
Compute = Callable[..., Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    """Draws normal fp64 numbers on the host."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def results(compute: Compute, inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Returns the output of `compute`, and the gradients of its inputs for the output's `gradient`.

    If the inputs are fp64, so is the computation.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = compute(*leaves)
    torch.autograd.backward(out, gradient.to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def expect_ratio(
    report: CheckReport,
    title: str,
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    exact: Sequence[Tensor],
    names: Sequence[str],
) -> None:
    """Adds a row with the largest error / allowed error of several tensors."""
    ratios = {n: ratio / HALF for n, ratio in _ratios(ours, theirs, exact, names).items()}
    holds = all(ratio <= 1 for ratio in ratios.values())  # false also for a NaN
    note = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    report.expect(title, holds, max(ratios.values()), ALLOWED, note)


def _ratios(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    exact: Sequence[Tensor],
    names: Sequence[str],
) -> dict[str, float]:
    """Returns, by name, the error of `ours` divided by the error of `theirs`."""
    return {
        name: rms(a.double() - reference) / rms(b.double() - reference)
        for name, a, b, reference in zip(names, ours, theirs, exact, strict=True)
    }


# ---- rotary embeddings ----


def check_rotary(report: CheckReport, options: Options) -> None:
    """Compares both layouts of rotary embeddings, forward and backward, in packed rows."""
    device, size, dim = torch.device(options.device), 64, 32
    lengths = document_lengths(seq_len(options))
    documents = PackedDocuments(doc_starts_of(lengths), device)
    rows = [torch.cat([torch.arange(length) for length in row]) for row in lengths]
    positions = torch.stack(rows).to(device)
    shape = (ROWS, HEADS, seq_len(options), 3 * size)
    inputs, gradients = draw(1, *shape).to(device), draw(2, *shape).to(device)
    for pairs in (True, False):
        for precision, dtype in DTYPES.items():
            x, gradient = inputs.to(dtype), gradients.to(dtype)
            tables = rotation(
                seq_len(options), dim, 10000.0, pairs=pairs, dtype=dtype, device=device
            ).at(documents.positions)

            def ours(fused: Tensor, pairs: bool = pairs, tables: Any = tables) -> Tensor:
                query, key, value = fused.chunk(3, -1)
                if pairs:
                    return torch.cat([rotate(query, tables), rotate(key, tables), value], -1)
                return torch.cat(split_and_rotate(fused, tables), -1)

            def plain(fused: Tensor, pairs: bool = pairs) -> Tensor:
                query, key, value = fused.chunk(3, -1)
                turned = [_rotate(part, positions, dim, pairs) for part in (query, key)]
                return torch.cat([*turned, value], -1)

            found, like = (results(compute, [x], gradient) for compute in (ours, plain))
            exact = results(plain, [x.double()], gradient)
            layout = "neighbours" if pairs else "halves"
            title = f"rotary {layout} {precision}"
            expect_ratio(report, title, found, like, exact, ("out", "dx"))


def _rotate(x: Tensor, positions: Tensor, dim: int, pairs: bool) -> Tensor:
    """Rotates as in transformers: angles in fp32 (fp64 for an fp64 `x`), cast to the type of x."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, dim, 2, dtype=wide, device=x.device) / dim
    angles = positions[:, None, :, None].to(wide) / 10000.0**exponents
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turned, rest = x[..., :dim], x[..., dim:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if pairs else turned.chunk(2, -1)
    new = (a * cos - b * sin, b * cos + a * sin)
    return torch.cat([torch.stack(new, -1).flatten(-2) if pairs else torch.cat(new, -1), rest], -1)


# ---- attention ----


def check_attention(report: CheckReport, options: Options) -> None:
    """Compares attention inside documents with each document alone, forward and backward.

    torch's fused attention has the allowed error. On a CPU in half precision, our attention of each
    document alone has it, because ours for short rows rounds more often; a row has the factor.
    """
    device = torch.device(options.device)
    starts = doc_starts_of(document_lengths(seq_len(options)))
    documents = PackedDocuments(starts, device)
    names = ("out", "dq", "dk", "dv")
    for size in (64, 256) if options.quick else (64, 80, 96, 128, 256):
        for precision, dtype in DTYPES.items():
            title = f"attention in documents {precision}, head {size}"
            drawn = [draw(n, ROWS, HEADS, seq_len(options), size) for n in range(4)]
            *x, gradient = (tensor.to(device, dtype) for tensor in drawn)
            wide = [tensor.double() for tensor in x]
            exact = results(_alone(_softmax, starts), wide, gradient)
            ours = results(partial(_ours, documents=documents), x, gradient)
            fused = results(_alone(_sdpa, starts), x, gradient)
            if precision == "fp32" or options.is_cuda:
                expect_ratio(report, title, ours, fused, exact, names)
            else:
                alone = results(_alone(_ours, starts), x, gradient)
                expect_ratio(report, title, ours, alone, exact, names)
                ratios = _ratios(ours, fused, exact, names)
                worst = max(ratios, key=lambda name: ratios[name])
                report.measure(f"{title}: error / torch's", ratios[worst], "times", worst)
            kernel = "one kernel" if has_varlen_kernel(*x) else "a call for each length"
            report.measure(f"{title}: way", kernel)


def _ours(*qkv: Tensor, documents: PackedDocuments | None = None) -> Tensor:
    return causal_attention(*qkv, dropout=0.0, site="", keys=None, documents=documents)


def _alone(attend: Compute, starts: Tensor) -> Compute:
    """Returns a function that computes one document at a time."""

    def compute(*qkv: Tensor) -> Tensor:
        rows: list[list[Tensor]] = [[] for _ in range(len(starts))]
        for row, span in documents_in(starts):
            rows[row].append(attend(*(tensor[row : row + 1, :, span] for tensor in qkv)))
        return torch.cat([torch.cat(parts, 2) for parts in rows])

    return compute


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def _softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ value


# ---- the head ----


def check_head(report: CheckReport, options: Options) -> None:
    """Compares loss and gradients of a head with 50,304 tokens, in one chunk and in several."""
    device, vocabulary = torch.device(options.device), 50304
    hidden, tokens = (512, 1100) if options.is_cuda else (32, 60 if options.quick else 200)
    labels = torch.randint(vocabulary, (2, tokens // 2), generator=torch.Generator().manual_seed(1))
    labels[0, 5:9] = IGNORED
    labels = labels.to(device)
    for family in ("gptneox",) if options.quick else ("gptj", "gptneox"):
        entry = MODELS[family]
        sizes = {entry.hidden_size: hidden, "num_attention_heads": 1, "vocab_size": vocabulary}
        head = entry.load().make_head(entry.load().config_class(**sizes))
        assert isinstance(head, Head)
        for seed, parameter in enumerate(head.parameters()):
            parameter.data = draw(seed, *parameter.shape) / hidden**0.5
        for precision, dtype in DTYPES.items():
            x = draw(9, 2, tokens // 2, hidden).to(device, dtype)
            head = head.to(device, dtype)
            theirs = _torch_head(head, x, labels)
            exact = _torch_head(_like(head, torch.float64), x.double(), labels)
            for chunks in (1, 4):
                loss, *ours = _our_head(head, x, labels, 4 * vocabulary * -(-tokens // chunks))
                title = f"head of {vocabulary} {family} {precision}, {chunks} chunks"
                # The error of the mean loss is at most the root mean square of token errors.
                mean = exact[0].mean().item()
                half = HALF * rms(theirs[0].double() - exact[0])
                allowed = TOLERANCE * mean if precision == "fp32" else half
                value = abs(loss.item() - mean) / allowed
                report.expect(f"{title}: loss", value <= 1, value, ALLOWED)
                names = [*dict(head.named_parameters()), "x"]
                expect_ratio(report, f"{title}: gradients", ours, theirs[1:], exact[1:], names)


def _like(head: Any, dtype: torch.dtype) -> nn.Module:
    """Returns a head of torch's own layers, with the weights of `head` in `dtype`."""
    norm, projection = head.final_norm, head.projection
    linear = nn.Linear(
        projection.in_features, projection.out_features, bias=projection.bias is not None
    )
    like = nn.Sequential(nn.LayerNorm(norm.normalized_shape, eps=norm.eps), linear)
    values = [value.to(dtype) for value in head.state_dict().values()]
    like.load_state_dict(dict(zip(like.state_dict(), values, strict=True)), assign=True)
    return like


def _torch_head(head: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """Computes the head as in transformers: all logits, which in half precision become fp32.

    Returns the losses of the trained tokens, and the gradients of the mean loss.
    """
    like = _like(head, x.dtype) if isinstance(head, Head) else head
    for parameter in like.parameters():
        parameter.requires_grad_()
    leaf, trained = x.clone().requires_grad_(), labels != IGNORED
    logits = like(leaf)[trained]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = functional.cross_entropy(wide, labels[trained], reduction="none")
    torch.autograd.backward(losses.mean())
    gradients = [parameter.grad for parameter in like.parameters()]
    return [losses.detach(), *(g for g in (*gradients, leaf.grad) if g is not None)]


def _our_head(head: Head, x: Tensor, labels: Tensor, chunk_bytes: int) -> list[Tensor]:
    """Returns the loss, and the gradients of the mean loss."""
    head = copy.deepcopy(head)
    gradients = gradients_of(head)
    attach_grad_buffer(head, gradients.buffer)
    gradients.begin_update(1)
    leaf, num_trained = x.clone().requires_grad_(), int((labels != IGNORED).sum())
    with patch("modules.layers.lm_head.chunk_bytes", return_value=chunk_bytes):
        loss = head.loss(leaf, labels, scale=1.0 / num_trained)
    torch.autograd.backward(loss)
    gradients.finish_exchange()
    assert leaf.grad is not None
    return [loss.detach() / num_trained, *gradients.buffer.views.values(), leaf.grad]
