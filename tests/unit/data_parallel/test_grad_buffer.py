"""Tests the gradient buffer: gradients equal autograd's; buckets are sent during backward."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from data_parallel.grad_buffer import GradBuffer
from modules.build import initialise_
from modules.layers.linear import Linear, attach_grad_buffer
from modules.layers.selective import MODES, Recompute
from modules.registry import MODELS
from modules.stage_model import StageModel
from pipeline_parallel.stage import Stage
from tests.support.gradients import gradients_of
from tests.support.models import make_hf
from tests.support.pipeline_doubles import NotedCommunicator

ROWS, TOKENS, MICROBATCHES, LAYERS = 2, 9, 3, 2
SEQUENTIAL, NO_BIAS = {"use_parallel_residual": False}, {"attention_bias": False}
MODELS_TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("gptneox", {"num_hidden_layers": LAYERS}),
    "neox-sequential": ("gptneox", {"num_hidden_layers": LAYERS, **SEQUENTIAL}),
    "neox-no-bias": ("gptneox", {"num_hidden_layers": LAYERS, **NO_BIAS}),
    "neox-sequential-no-bias": ("gptneox", {"num_hidden_layers": LAYERS, **SEQUENTIAL, **NO_BIAS}),
    "gptj": ("gptj", {"n_layer": LAYERS}),
    "llama": ("llama", {"num_hidden_layers": LAYERS, "attention_bias": True}),
}
WAYS = list(product(MODES.values(), [False, True]))  # recompute, and separate weight gradients
EPS = torch.finfo(torch.float32).eps


def make_model(name: str) -> StageModel:
    family_name, changes = MODELS_TRIED[name]
    config = make_hf(family_name, **changes).config
    model = StageModel(MODELS[family_name].load(), config, range(LAYERS + 2), device="cpu")
    for index, module in enumerate(model):
        initialise_(module, std=0.2, seed=1, index=index)
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model


def microbatches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shape = (ROWS, TOKENS)
    return [torch.randint(0, 97, shape, generator=generator) for _ in range(MICROBATCHES)]


def run(stage: Stage, *, later: bool) -> None:
    """Runs all microbatches; `later` delays each weight gradient until after the next backward."""
    for number, tokens in enumerate(microbatches()):
        stage.forward(number, tokens, tokens, range(ROWS), loss_scale=1.0)
        stage.backward(number, None)
        if later and number >= 1:
            stage.weight_gradient(number - 1)
    if later:
        stage.weight_gradient(MICROBATCHES - 1)


def computed(name: str, recompute: Recompute, later: bool) -> dict[str, Tensor]:
    torch.manual_seed(2)
    model = make_model(name)
    gradients = gradients_of(model)
    gradients.begin_update(MICROBATCHES)
    run(Stage(model, recompute=recompute, gradients=gradients.buffer, splits=later), later=later)
    gradients.finish_exchange()
    return gradients.buffer.views


def autograds(name: str) -> dict[str, Tensor]:
    """Returns autograd's fp64 gradients; the loss is not computed in chunks of tokens."""
    torch.manual_seed(2)
    model = make_model(name).double()
    for tokens in microbatches():
        logits = model(tokens, None).flatten(0, 1)
        labels = tokens[:, :-1].flatten()  # labels are at the positions that predict them
        torch.autograd.backward(nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS_TRIED)
def test_gradients_are_autograds(name: str) -> None:
    """Gradients equal autograd's up to fp32 rounding; all ways to compute them give equal bits."""
    expected = autograds(name)
    found = computed(name, *WAYS[0])
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        worst = (found[key].double() - gradient).abs().max()
        assert worst <= 100 * EPS * gradient.abs().max(), key
        assert gradient.abs().max() > 0
    for way in WAYS[1:]:
        other = computed(name, *way)
        assert all(torch.equal(other[key], found[key]) for key in found), way


def test_one_microbatch_has_the_bits_of_torch() -> None:
    torch.manual_seed(3)
    ours, theirs = Linear(33, 17), nn.Linear(33, 17)
    theirs.load_state_dict(ours.state_dict())
    buffer = gradients_of(ours).buffer
    attach_grad_buffer(ours, buffer)
    x, gradient = torch.randn(5, 33), torch.randn(5, 17)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, given in zip((ours, theirs), inputs, strict=True):
        torch.autograd.backward(layer(given), gradient)
    assert theirs.weight.grad is not None
    assert torch.equal(buffer.views["weight"], theirs.weight.grad)
    grads = [x.grad for x in inputs if x.grad is not None]
    assert torch.equal(*grads)


# ---- each parameter, once a microbatch ----


@contextmanager
def noted() -> Iterator[list[str]]:
    """Yields a list; each call of `GradBuffer.count_microbatch` appends its argument `name`."""
    names: list[str] = []
    count = GradBuffer.count_microbatch

    def noting(buffer: GradBuffer, name: str) -> None:
        names.append(name)
        count(buffer, name)

    with patch.object(GradBuffer, "count_microbatch", noting):
        yield names


DTYPES = (torch.float32, torch.bfloat16)
NOTED = [  # every pair of model, way and type
    (name, *way, dtype)
    for i, name in enumerate(MODELS_TRIED)
    for j, way in enumerate(WAYS)
    for k, dtype in enumerate(DTYPES)
    if (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("name", "recompute", "later", "dtype"), NOTED)
def test_each_parameter_is_noted_once_a_microbatch(
    name: str, recompute: Recompute, later: bool, dtype: torch.dtype
) -> None:
    model = make_model(name).to(dtype)
    gradients = gradients_of(model)
    stage = Stage(model, recompute=recompute, gradients=gradients.buffer, splits=later)
    with noted() as names:
        for _ in range(2):  # a second update counts from zero
            gradients.begin_update(MICROBATCHES)
            run(stage, later=later)
            gradients.finish_exchange()
    parameters = dict(model.named_parameters())
    assert Counter(names) == dict.fromkeys(parameters, 2 * MICROBATCHES)
    assert all((p.grad is None) == (dtype != torch.float32) for p in parameters.values())


def test_chunks_of_a_head_are_noted_as_one() -> None:
    model = make_model("neox")
    gradients = gradients_of(model)
    stage = Stage(model, recompute="none", gradients=gradients.buffer, splits=False)
    with noted() as names, patch("modules.layers.lm_head.chunk_bytes", return_value=4 * 97 * 5):
        run(stage, later=False)
    assert Counter(names)[f"{LAYERS + 1}.embed_out.weight"] == MICROBATCHES


def test_a_microbatch_too_few_is_found() -> None:
    model = make_model("neox")
    gradients = gradients_of(model)
    gradients.begin_update(MICROBATCHES + 1)
    run(Stage(model, recompute="none", gradients=gradients.buffer, splits=False), later=False)
    with pytest.raises(AssertionError, match="no gradients came for"):
        gradients.finish_exchange()


# ---- buckets ----


class Update:
    """Record of the collective calls of a stage in one update; the buckets are small.

    `starts` lists the parameters of each bucket, in the order in which the buckets were sent.
    `left` has two numbers for each microbatch: how many buckets were sent before its backward
    began, and how many were sent before its last gradient (the embedding's) came.
    """

    def __init__(
        self, *, rank: int, recompute: Recompute, later: bool, sharded: bool, name: str = "neox"
    ) -> None:
        model, replicas = make_model(name), NotedCommunicator(rank, 2)
        with patch("data_parallel.grad_buffer.BUCKET_BYTES", 4096):
            gradients = gradients_of(model, replicas, sharded=sharded)
        self.owner, buffer = gradients.partition.owner, gradients.buffer
        stage = Stage(model, recompute=recompute, gradients=gradients.buffer, splits=later)
        self.left: list[int] = []
        backward, add_rows = stage.backward, buffer.add_rows

        def at_backward(*args: Any) -> Tensor | None:
            self.left.append(len(replicas.summed))
            return backward(*args)

        def at_end(*args: Any) -> None:
            self.left.append(len(replicas.summed))
            add_rows(*args)

        with patch.object(stage, "backward", at_backward), patch.object(buffer, "add_rows", at_end):
            gradients.begin_update(MICROBATCHES)
            run(stage, later=later)
        self.waits = [event for event in replicas.events if event.startswith("wait")]
        gradients.finish_exchange()
        self.events = replicas.events
        self.starts = [names_in(summed, buffer.views) for summed, _ in replicas.summed]
        self.roots = [root for _, root in replicas.summed]


def names_in(buffer: Tensor, views: dict[str, Tensor]) -> list[str]:
    """Returns the names of the gradients in `views` that are in the memory of `buffer`."""
    end = buffer.data_ptr() + buffer.nbytes
    return [n for n, v in views.items() if buffer.data_ptr() <= v.data_ptr() < end]


@pytest.mark.parametrize("recompute", MODES.values())
def test_buckets_leave_before_backward_is_over(recompute: Recompute) -> None:
    """In the last backward, at most two buckets are unsent when the embedding's gradient comes.

    The stage waits for a bucket only after all buckets are sent.
    """
    update = Update(rank=0, recompute=recompute, later=False, sharded=False)
    *_, begun, ended = update.left
    assert len(update.starts) > 8
    assert begun <= 1, "after forward, only the head's bucket is complete"
    assert len(update.starts) - ended <= 2, "the embedding's bucket comes last"
    assert update.left[:-2] == [0] * (len(update.left) - 2)
    assert update.waits == []
    assert update.events[len(update.starts) :] == ["wait for all-reduce"] * len(update.starts)


@pytest.mark.parametrize("sharded", [False, True])
def test_buckets_leave_in_one_order_on_all_replicas(sharded: bool) -> None:
    """Replicas send buckets from last to first layer, even if gradients come in another order."""
    updates = [
        Update(rank=rank, recompute=recompute, later=later, sharded=sharded)
        for rank in (0, 1)
        for recompute, later in WAYS
    ]
    assert all(update.starts == updates[0].starts for update in updates)
    starts, order = updates[0].starts, [name for name, _ in make_model("neox").named_parameters()]
    assert sorted(name for names in starts for name in names) == sorted(order)
    firsts = [min(map(order.index, names)) for names in starts]
    assert all(later > sooner for later, sooner in pairwise(firsts))


@pytest.mark.parametrize("name", ["neox", "gptj"])
def test_sharded_gradients_go_to_their_owners(name: str) -> None:
    update = Update(rank=1, recompute="none", later=True, sharded=True, name=name)
    assert set(update.roots) == {0, 1}
    for names, root in zip(update.starts, update.roots, strict=True):
        assert {update.owner(name) for name in names} == {root}
    whole = Update(rank=1, recompute="none", later=True, sharded=False, name=name)
    assert set(whole.roots) == {None}


def test_buckets_cover_the_buffer_once() -> None:
    model = make_model("neox")
    with patch("data_parallel.grad_buffer.BUCKET_BYTES", 4096):
        buffer = gradients_of(model, NotedCommunicator(0, 2), sharded=True).buffer
    buckets = [bucket.gradients for bucket in buffer._buckets]
    starts = [bucket.data_ptr() for bucket in buckets]
    ends = [bucket.data_ptr() + bucket.nbytes for bucket in buckets]
    first = buffer.flat.data_ptr()
    assert sorted([*starts, first + buffer.flat.nbytes]) == sorted([first, *ends])


# ---- frozen parameters ----


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_has_no_gradient(frozen: str) -> None:
    torch.manual_seed(3)
    layer, twin = Linear(33, 17), Linear(33, 17)
    twin.load_state_dict(layer.state_dict())
    layer.get_parameter(frozen).requires_grad_(False)
    x, gradient = torch.randn(5, 33), torch.randn(5, 17)
    found = {}
    for which in (layer, twin):
        gradients = gradients_of(which)
        attach_grad_buffer(which, gradients.buffer)
        gradients.begin_update(1)
        torch.autograd.backward(which(x), gradient)
        gradients.finish_exchange()
        found[which] = gradients.buffer.views
    (trained,) = found[layer]
    assert trained != frozen
    assert torch.equal(found[layer][trained], found[twin][trained])
