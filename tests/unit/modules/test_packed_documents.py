"""Tests packed documents; the reference is Hugging Face's model on one document at a time.

Attention is computed in one of two ways: with one call for each length of documents, or with one
call of a GPU kernel for all documents. The tests cover both ways; they simulate the kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec, patch

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

from modules.attention import varlen
from modules.attention.causal import causal_attention
from modules.attention.cpu import is_short
from modules.attention.packed_documents import PackedDocuments
from modules.layers.rotary import rotate, rotation
from modules.layers.selective import MODES
from tests.support.documents import doc_starts_of, documents_in, losses_alone
from tests.support.models import (
    TOLERANCE,
    check_gradients,
    from_hf,
    make_hf,
)

CPU = torch.device("cpu")
ROWS = [[5, 1, 12, 7, 8], [33], [16, 16, 1], [11, 11, 11]]  # lengths of documents
TOKENS = 33
MODELS_TRIED: list[tuple[str, dict[str, Any]]] = [
    ("gptneox", {}),
    ("gptneox", {"use_parallel_residual": False}),
    ("gptj", {}),
    ("llama", {}),
    ("mistral", {}),  # the window is shorter than some documents
    ("qwen3", {}),
]


def packed(rows: list[list[int]] = ROWS) -> PackedDocuments:
    return PackedDocuments(doc_starts_of(rows), CPU)


# ---- where documents lie ----


def test_places_of_documents() -> None:
    documents = PackedDocuments(torch.tensor([[0, 0, 0, 3, 4], [0, 1, 1, 1, 4]]), CPU)
    assert documents.positions.tolist() == [[0, 1, 2, 0, 0], [0, 0, 1, 2, 0]]
    assert documents.lengths_of_rows == [[3, 1, 1], [1, 3, 1]]
    assert documents.bounds.tolist() == [0, 3, 4, 5, 6, 9, 10]
    assert documents.bounds.dtype == torch.int32
    assert documents.longest == 3
    assert documents.groups == [(4, 1), (2, 3)]
    assert documents.by_length.tolist() == [3, 4, 5, 9, 0, 1, 2, 6, 7, 8]
    assert documents.by_length[documents.original_order].tolist() == list(range(10))


@pytest.mark.parametrize("pairs", [False, True])
def test_positions_begin_anew_in_each_document(pairs: bool) -> None:
    """A document's rotary embedding and gradients have the same bits with and without packing."""
    x, gradient = torch.randn(2, len(ROWS), 3, TOKENS, 8)
    options: dict[str, Any] = {"pairs": pairs, "dtype": torch.float32, "device": CPU}
    together = x.clone().requires_grad_()
    out = rotate(together, rotation(TOKENS, 6, 100.0, **options).at(packed().positions))
    torch.autograd.backward(out, gradient)
    assert together.grad is not None
    for row, here in documents_in(packed().doc_starts):
        one = (slice(row, row + 1), slice(None), here)
        alone = x[one].clone().requires_grad_()
        turned = rotate(alone, rotation(here.stop - here.start, 6, 100.0, **options))
        torch.autograd.backward(turned, gradient[one])
        assert torch.equal(out[one], turned)
        assert alone.grad is not None
        assert torch.equal(together.grad[one], alone.grad)


# ---- against each document alone ----


def test_both_ways_of_attending_to_a_length_are_tried() -> None:
    """Some documents in ROWS are short enough for `short_attention`; others are too long for it."""
    lengths = {length for row in ROWS for length in row}
    assert {is_short(torch.empty(1, 4, length, 8)) for length in lengths} == {True, False}


@contextmanager
def with_kernel() -> Iterator[Any]:
    """Replaces torch's GPU kernel by `_kernel`; yields the mock, which counts the calls."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(varlen, "has_varlen_kernel", return_value=True))
        double = create_autospec(varlen_attn, side_effect=_kernel)
        yield stack.enter_context(patch("torch.nn.attention.varlen.varlen_attn", double))


def _kernel(query: Tensor, key: Tensor, value: Tensor, *options: Any, **more: Any) -> Tensor:
    """Computes causal attention like torch's `varlen_attn`, and checks the arguments."""
    cu_seq_q, cu_seq_k, max_q, max_k = options
    earlier, later = more["window_size"]
    assert later == 0
    assert more["enable_gqa"] == (query.shape[1] != key.shape[1])
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    bounds = cu_seq_q.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(query))
    assert max_q == max_k == max(b - a for a, b in pairwise(bounds))
    out = []
    for start, stop in pairwise(bounds):
        q, k, v = (tensor[start:stop] for tensor in (query, key, value))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        hidden = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        if earlier >= 0:
            hidden |= torch.ones_like(hidden).tril(-earlier - 1)
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", shares, v))
    return torch.cat(out)


WAYS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "by length": nullcontext,
    "at once": with_kernel,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "changes"), MODELS_TRIED)
def test_losses_and_gradients_are_those_of_each_document_alone(
    name: str, changes: dict[str, Any], way: str, tmp_path: Path
) -> None:
    theirs = make_hf(name, **changes)
    ours = from_hf(name, theirs, tmp_path)
    tokens, documents = torch.randint(0, 97, (len(ROWS), TOKENS)), packed()
    with WAYS[way]() as kernel:
        logits = ours(tokens, None, documents=documents)
        assert kernel is None or kernel.call_count == theirs.config.num_hidden_layers
    losses = functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    expected = losses.detach().clone()  # the last token of a document predicts nothing
    apart = torch.zeros_like(losses)
    for row, here in documents_in(documents.doc_starts):
        alone = losses_alone(theirs, tokens[row, here])
        torch.autograd.backward(alone.sum())
        place = (row, slice(here.start, here.stop - 1))
        expected[place], apart[place] = alone.detach(), 1.0
    assert ((losses - expected).abs() / expected).max() < TOLERANCE
    torch.autograd.backward((losses * apart).sum())
    check_gradients(ours, theirs, name)
    whole = functional.cross_entropy(ours(tokens, None).mT, tokens[:, 1:], reduction="none")
    assert ((whole - expected).abs() / expected).max() > 100 * TOLERANCE, (
        "other documents would change losses"
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "changes"), MODELS_TRIED)
def test_no_token_sees_another_document(
    name: str, changes: dict[str, Any], way: str, tmp_path: Path
) -> None:
    """A document's input changes no other document's outputs, and gets no gradient from them."""
    ours = from_hf(name, make_hf(name, **changes), tmp_path)
    documents = packed()
    changed = torch.zeros(len(ROWS), TOKENS, dtype=torch.bool)
    changed[0, 6:18] = True  # its third document
    tokens = torch.randint(0, 97, (len(ROWS), TOKENS))
    others = torch.where(changed, (tokens + 1) % 97, tokens)
    with WAYS[way]():
        before, after = (ours(t, None, documents=documents) for t in (tokens, others))
        x = torch.randn(len(ROWS), TOKENS, 32, requires_grad=True)
        torch.autograd.backward(ours[1](x, None, documents)[~changed].square().sum())
    same = (before == after).all(-1)
    assert torch.equal(same, ~changed[:, :-1])
    assert x.grad is not None
    assert not x.grad[changed].any()
    assert x.grad[~changed].any(-1).all()


@pytest.mark.parametrize(("name", "changes"), MODELS_TRIED)
def test_a_document_is_the_same_wherever_it_lies(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """A document's output has the same bits at two places of a row, since positions restart."""
    block = from_hf(name, make_hf(name, **changes), tmp_path)[1]
    x, between = torch.randn(2, 1, 16, 32)
    row = torch.cat([x, between, x], 1)
    out = block(row, None, packed([[16, 16, 16]]))
    assert torch.equal(out[:, :16], out[:, 32:])
    whole = block(row, None, None)
    assert not torch.allclose(whole[:, :16], whole[:, 32:], atol=1e-3)


def test_documents_that_are_whole_rows_are_rows(tmp_path: Path) -> None:
    """If each row is one document, outputs are the same as without `documents`; no kernel runs."""
    ours = from_hf("gptneox", make_hf("gptneox"), tmp_path)
    tokens = torch.randint(0, 97, (2, TOKENS))
    with with_kernel() as kernel:
        found = ours(tokens, None, documents=packed([[TOKENS], [TOKENS]]))
    assert not kernel.called
    assert torch.equal(found, ours(tokens, None))


# ---- the kernel, without a GPU ----


def test_the_kernel_takes_what_it_is_given() -> None:
    """torch's `varlen_attn` accepts our arguments in forward and backward, with fake tensors."""
    documents, shape = packed(), (len(ROWS), 4, TOKENS, 8)
    numbers = documents.groups, documents.longest, len(documents.bounds)  # fake tensors lack them
    assert numbers == ([(2, 1), (1, 5), (1, 7), (1, 8), (3, 11), (1, 12), (2, 16), (1, 33)], 33, 13)
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (
            torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        with patch.object(varlen, "has_varlen_kernel", return_value=True):
            out = varlen.varlen_attention(query, key, value, documents)
        torch.autograd.backward(out.sum())
    assert out.shape == shape
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.shape == shape


@pytest.mark.parametrize(("size", "expected"), [(64, True), (256, True), (20, False)])
def test_heads_that_torch_would_pad_go_without_the_kernel(size: int, expected: bool) -> None:
    query = torch.empty(1, 1, 4, size, dtype=torch.bfloat16)
    assert not varlen.has_varlen_kernel(query, query, query), "on a CPU"
    with patch.object(varlen, "can_use_flash_attention", return_value=True):
        assert varlen.has_varlen_kernel(query, query, query) == expected


# ---- dropout ----


def attend(qkv: list[Tensor], rows: list[list[int]], keys: tuple[int, ...]) -> Tensor:
    documents = packed(rows)
    return causal_attention(*qkv, dropout=0.4, site="here", keys=keys, documents=documents)


def test_a_documents_mask_hangs_on_its_sequence_and_number() -> None:
    """A document's dropout mask depends only on its row's dropout key and its number in the row."""
    qkv = list(torch.randn(3, 2, 4, 24, 8))
    rows = [[10, 6, 8], [10, 14]]
    with with_kernel() as kernel:
        together = attend(qkv, rows, (7, 8))
        assert not kernel.called, "the kernel has no dropout"
    torch.rand(5)
    for row, lengths in enumerate(rows):
        alone = attend([tensor[row : row + 1] for tensor in qkv], [lengths], (7 + row,))
        assert torch.equal(alone[0], together[row])
    first = attend([tensor[:1, :, :10] for tensor in qkv], [[10]], (7,))
    assert torch.equal(first[0], together[0, :, :10])
    again = [torch.cat([tensor[:1, :, :10]] * 2, 2) for tensor in qkv]
    one, two = attend(again, [[10, 10]], (7,)).split(10, 2)
    assert torch.equal(one, first)
    assert not torch.allclose(one, two, atol=1e-2), "each number has its own mask"
    assert not torch.allclose(first, attend([t[:1, :, :10] for t in qkv], [[10]], (8,)), atol=1e-2)


@pytest.mark.parametrize("documents", [None, packed()], ids=["whole rows", "documents"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_gives_the_same_bits(
    dropout: float, documents: PackedDocuments | None, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"hidden_dropout": dropout, "attention_dropout": dropout}
    ours = from_hf("gptneox", make_hf("gptneox", **changes), tmp_path)
    run = partial(ours, torch.randint(0, 97, (len(ROWS), TOKENS)), range(len(ROWS)))
    gradients = []
    for recompute in MODES.values():
        ours.zero_grad()
        run(documents=documents, recompute=recompute).square().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    for first, *others in zip(*gradients, strict=True):
        assert all(torch.equal(first, other) for other in others)
