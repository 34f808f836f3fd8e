"""Loss and gradients of one model in our modules and in Hugging Face's, on any device.

The model is tiny, but its heads have real sizes. Both sides get the same weights, tokens and
labels. The results are compared in fp64.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from checkpoint.files.hf_weights import hf_names
from comm.backends.single_process import SingleProcessCommunicator
from common.seeds import dropout_keys
from modules.layers.lm_head import IGNORED
from modules.layers.selective import Recompute
from modules.registry import MODELS
from modules.stage_model import StageModel
from optimizer.adam import Adam
from optimizer.build import build_optimizer
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.stage import Stage
from tests.support.documents import doc_starts_of, documents_in
from tests.support.models import from_hf, hf_parameter, make_hf

FAMILIES = ("gptj", "gptneox", "qwen3")
VOCABULARY, HEADS, LAYERS = 211, 2, 2
ROWS, MICROBATCHES = 4, 2
SCALE = {"fp32": 1.0, "bf16": 1.0, "fp16": 1024.0}  # the loss scale
KEYS = dropout_keys(1, update=0, first=0, count=ROWS)
DROPOUT: dict[str, dict[str, float]] = {
    "gptj": {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1},
    "gptneox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "qwen3": {"attention_dropout": 0.1},
}


@dataclass(frozen=True)
class Text:
    """The rows of a batch.

    token_ids, labels: (rows, seq_len) on the device; some labels are IGNORED.
    doc_starts: (rows, seq_len) on the host; None if a row is one document.
    """

    token_ids: Tensor
    labels: Tensor
    doc_starts: Tensor | None

    @property
    def num_trained(self) -> int:
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Result:
    """The mean loss of the trained tokens, and the gradients by name in our modules, in fp64.

    token_losses: the losses of the trained tokens, in the order of the rows; None for our modules,
        which return only the sum.
    """

    loss: float
    gradients: dict[str, Tensor]
    token_losses: Tensor | None = None


def make_text(device: torch.device, seq_len: int, *, documents: bool = False) -> Text:
    """Draws a batch; every seventh label is IGNORED."""
    generator = torch.Generator().manual_seed(7)
    token_ids = torch.randint(VOCABULARY, (ROWS, seq_len), generator=generator)
    labels = token_ids.roll(-1, 1)
    labels[:, 3::7] = IGNORED
    labels[:, -1] = IGNORED
    if not documents:
        return Text(token_ids.to(device), labels.to(device), None)
    doc_starts = doc_starts_of(document_lengths(seq_len))
    labels[:, :-1][doc_starts[:, 1:] != doc_starts[:, :-1]] = IGNORED
    return Text(token_ids.to(device), labels.to(device), doc_starts)


def document_lengths(seq_len: int) -> list[list[int]]:
    """Returns the lengths of the documents in each of ROWS rows.

    Several documents have the same length, one has a single token, and one fills its row.
    """
    half, quarter = seq_len // 2, seq_len // 4
    rest = seq_len - half - quarter
    return [
        [half, quarter, rest],
        [quarter, 1, seq_len - quarter - 1],
        [seq_len],
        [half, seq_len - half],
    ]


def make_model(family: str, head_size: int, device: torch.device, **changes: Any) -> Any:
    """Builds Hugging Face's model with heads of `head_size`, in fp32, with biases that are not 0.

    As in the published models, a part of a head is rotated in gptj and gptneox. In qwen3 both query
    heads share one key head, and the second block has a sliding window.
    """
    hidden = HEADS * head_size
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 2048,
    }
    if family == "gptj":
        sizes = {
            "n_embd": hidden,
            "n_head": HEADS,
            "n_layer": LAYERS,
            "n_inner": 2 * hidden,
            "n_positions": 2048,
            "rotary_dim": head_size // 4 * 2,
        }
    if family == "qwen3":
        sizes |= {
            "num_key_value_heads": 1,
            "head_dim": head_size,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        }
    return make_hf(family, **{"vocab_size": VOCABULARY, **sizes, **changes}).to(device)


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Returns a copy of `model` whose weights are cast; its rotary tables stay in fp32."""
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied


def hf_result(
    family: str, model: Any, text: Text, *, alone: bool = False, scale: float = 1.0
) -> Result:
    """Computes loss and gradients in Hugging Face's model.

    With `alone`, each document is a batch of its own. Else the batches are our microbatches, and a
    mask keeps the documents of a row apart. So a sum over the tokens of a batch has as many terms
    as ours, and the rounding errors of both sides can be compared. As in transformers, logits in
    half precision become fp32 before the loss.
    """
    model.zero_grad()
    parts = list(_documents(text) if alone else _microbatches(text))
    losses = torch.cat([_token_losses(model, *part) for part in parts])
    torch.autograd.backward(losses.mean() * scale)
    gradients = {}
    for index in range(LAYERS + 2):
        keys = hf_names(MODELS[family].load(), model.config, index)
        for ours, theirs in keys.items():
            gradient = hf_parameter(model, theirs).grad
            assert gradient is not None, theirs
            gradients[f"{index}.{ours}"] = gradient.double() / scale
    losses = losses.detach().double()
    return Result(losses.mean().item(), gradients, losses)


Part = tuple[Tensor, Tensor, dict[str, Tensor]]  # token ids, labels, further inputs of the model


def _documents(text: Text) -> Iterator[Part]:
    starts = text.doc_starts
    if starts is None:
        starts = torch.zeros(text.token_ids.shape, dtype=torch.int64)
    for row, span in documents_in(starts):
        yield text.token_ids[row : row + 1, span], text.labels[row : row + 1, span], {}


def _microbatches(text: Text) -> Iterator[Part]:
    count = ROWS // MICROBATCHES
    for rows in (slice(start, start + count) for start in range(0, ROWS, count)):
        more: dict[str, Tensor] = {}
        if text.doc_starts is not None:
            starts = text.doc_starts[rows].to(text.token_ids.device)
            position = torch.arange(starts.shape[1], device=starts.device)
            # (rows, 1, query, key): the same document, and no later key
            same = starts[:, None, :, None] == starts[:, None, None, :]
            more["attention_mask"] = same & (position[:, None] >= position)
            more["position_ids"] = position - starts
        yield text.token_ids[rows], text.labels[rows], more


def _token_losses(model: Any, token_ids: Tensor, labels: Tensor, more: dict[str, Tensor]) -> Tensor:
    given: dict[str, Any] = dict(more)
    window, mask = getattr(model.config, "sliding_window", None), more.get("attention_mask")
    if window is not None and mask is not None:  # a mask takes the place of the model's windows
        near = mask.triu(1 - window)
        given["attention_mask"] = {"full_attention": mask, "sliding_attention": near}
    logits = model(token_ids, use_cache=False, **given).logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    trained = labels != IGNORED
    return functional.cross_entropy(logits[trained], labels[trained], reduction="none")


@dataclass(frozen=True)
class OurRun:
    """How our modules compute: precision, recompute, a split backward, dropout."""

    precision: str = "fp32"
    recompute: Recompute = "none"
    splits: bool = False
    dropout: bool = False


def our_result(family: str, model: Any, text: Text, run: OurRun) -> Result:
    """Computes loss and gradients in our modules, with the weights of Hugging Face's `model`.

    The batch is cut into MICROBATCHES microbatches, whose gradients are added up in the gradient
    buffer, as in training.
    """
    device = text.token_ids.device
    stage_model = our_model(family, model, device)
    optimizer = build_optimizer(
        stage_model,
        Adam(),
        precision=run.precision,
        weight_decay=0.0,
        replicas=SingleProcessCommunicator(),
    )
    gradients = optimizer.gradients
    stage = Stage(
        stage_model, recompute=run.recompute, gradients=gradients.buffer, splits=run.splits
    )
    batch = PipelineBatch(
        text.token_ids, text.labels, KEYS, ROWS // MICROBATCHES, doc_starts=text.doc_starts
    )
    scale, losses = SCALE[run.precision], list[float]()
    gradients.begin_update(MICROBATCHES)
    for index in range(MICROBATCHES):
        token_ids = batch.token_ids(index)
        assert token_ids is not None
        loss = stage.forward(
            index,
            token_ids,
            batch.labels(index),
            batch.keys(index) if run.dropout else None,
            loss_scale=scale / batch.num_trained_tokens(),
            documents=batch.documents(index, device),
        )
        losses.append(loss.item())
        stage.backward(index, None)
        if run.splits:
            stage.weight_gradient(index)
    gradients.finish_exchange()
    found = {name: view.double() / scale for name, view in gradients.buffer.views.items()}
    return Result(sum(losses) / text.num_trained, found)


def our_model(family: str, model: Any, device: torch.device) -> StageModel:
    """Builds our modules as one stage in fp32, with the weights of Hugging Face's `model`."""
    with TemporaryDirectory() as folder:
        return from_hf(family, model, Path(folder), device=device)


@contextmanager
def deterministic() -> Iterator[None]:
    """Allows only deterministic algorithms of torch in the `with` block."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
