"""Reference for fp16 training, which computes a run's metrics in one process with plain torch.

It uses our modules in half precision, torch's AdamW on fp32 masters, and torch.amp.GradScaler with
the loss scale that `moved` returns. It shares with the tested code only the forward of embedding,
blocks and norms, which tests/unit/modules compare with transformers.
Activations and their gradients are rounded to fp16, because fp16 stores them. Gradients of linear
layers and embeddings are summed in fp32 and not rounded. A run does the same, except on a CPU that
computes their matmul in fp16. Gradients of logits, (softmax - one-hot label) x scale, are computed
in fp32 and rounded at the end.
If a master of the run and the same master of the reference differ in the last bit, their fp16
weights can be rounded to different values, and then losses differ by roundings of fp16. Therefore
the reference adds gradients in one fixed order (microbatch by microbatch, token by token) and
rounds the clipped gradients once. So the gradients of reference and run are equal bit for bit.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import get_linear_schedule_with_warmup

from checkpoint.resume.load import load_shards_
from modules.registry import MODELS
from modules.stage_model import StageModel
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.data import tokenizer

LAYERS, ROWS, TOKENS, UPDATES, WARMUP, LR = 4, 4, 16, 10, 2, 2e-3
REPLICAS = 2  # of the runs with a reference

Sums = dict[Tensor, Tensor]  # gradients in fp32
Scale = tuple[float, int, int]  # scale, remaining hysteresis, clean updates in a row


@dataclass(frozen=True)
class Recipe:
    """Settings of a run with a reference; the updates in `poisoned` (counted from 1) overflow."""

    updates: int = UPDATES
    accumulate: int = 1
    scale: float = 1024.0
    hysteresis: int = 1
    window: int = 3
    max_norm: float = float("inf")
    poisoned: Collection[int] = ()


def moved(scale: float, left: int, clean: int, overflow: bool, recipe: Recipe) -> Scale:
    """Returns the new loss scale, hysteresis left, and updates in a row without overflow."""
    if overflow:
        left = max(left - 1, 0)
        return (scale / 2 if left == 0 else scale), left, 0
    if clean + 1 == recipe.window:
        return scale * 2, recipe.hysteresis, 0
    return scale, left, clean + 1


def twin(folder: Path, recipe: Recipe) -> list[dict[str, Any]]:
    """Returns the metrics that a run should have, computed in one process."""
    model = Twin(folder)
    masters = [p for module in load_model(folder) for p in module.parameters()]
    groups = [
        {"params": [p for p in masters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in masters if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=LR, eps=1e-6, fused=True)
    schedule = get_linear_schedule_with_warmup(adamw, WARMUP, recipe.updates)
    scaler = torch.amp.GradScaler("cpu", init_scale=recipe.scale)
    scale, left, clean, lines = recipe.scale, recipe.hysteresis, 0, []
    specs = [SourceSpec(str(folder / "a.jsonl"))]
    blocks = open_training_stream(specs, tokenizer(), seq_len=TOKENS, seed=42)
    nominal = recipe.accumulate * ROWS * (TOKENS - 1)
    for update in range(1, recipe.updates + 1):
        sums = [model.empty_sums() for _ in range(REPLICAS)]
        for _ in range(recipe.accumulate):
            loss = 0.0
            for replica in sums:
                of_replica = 0.0
                for _ in range(ROWS // REPLICAS):
                    tokens = torch.from_numpy(blocks.next_block().token_ids)
                    token_loss = model.loss(tokens, replica)
                    model.backward(scaler.scale(token_loss / nominal), replica)
                    of_replica += token_loss.item()
                loss += of_replica
            mean = loss / (ROWS * (TOKENS - 1))
            lines.append({"loss": mean, "lr": None, "grad_norm": None, "loss_scale": scale})
        for master, *of_replicas in zip(masters, *(s.values() for s in sums), strict=True):
            master.grad = sum(of_replicas[1:], of_replicas[0])
        if update in recipe.poisoned:
            assert masters[0].grad is not None
            masters[0].grad[0, 0] = float("inf")
        scaler.unscale_(adamw)
        norm = clip_(masters, recipe.max_norm)
        overflow = not math.isfinite(norm)
        lines[-1] |= {"lr": schedule.get_last_lr()[0], "grad_norm": None if overflow else norm}
        scaler.step(adamw)
        if not overflow:
            schedule.step()
        scale, left, clean = moved(scale, left, clean, overflow, recipe)
        scaler.update(new_scale=scale)
        model.copy_(masters)
    return lines


def clip_(masters: Sequence[Tensor], max_norm: float) -> float:
    """Clips like torch's clip_grad_norm_, but computes sum of squares and divisor in fp64.

    It divides, because torch's fused AdamW, which clips in a run, divides by a number in fp32.
    """
    gradients = [master.grad for master in masters if master.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    norm = norms.double().square().sum().sqrt().item()
    if max_norm < norm < math.inf:
        for gradient in gradients:
            gradient.div_((norm + 1e-6) / max_norm)
    return norm


class CrossEntropy(torch.autograd.Function):
    """Sum of the token losses; the logits have the shape (tokens, vocabulary)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        return functional.cross_entropy(logits, labels, reduction="sum")

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        gradient = torch.log_softmax(logits, 1).exp()
        gradient -= functional.one_hot(labels, logits.shape[1])
        return gradient * scale, None


class WideLinear(nn.Module):
    """A linear layer that multiplies in fp32 and rounds its output to fp16.

    The gradients of the layer's parameters are added to `sums`.
    """

    def __init__(self, half: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = half.weight, half.bias
        self.sums: Sums = {}

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.detach().float()
        out = functional.linear(x.float(), self.weight.detach().float(), bias).half()
        out.register_hook(partial(self.add, x.detach()[0].float()))
        return out

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Adds gradients to `sums`; x is (tokens, inputs), gradient is (1, tokens, outputs)."""
        self.sums[self.weight].addmm_(gradient[0].float().t(), x)
        if self.bias is not None:
            self.sums[self.bias].add_(gradient[0].float().sum(0))


class WideLookup(nn.Module):
    """An embedding whose gradients are added to `sums` in fp32."""

    def __init__(self, half: nn.Embedding) -> None:
        super().__init__()
        self.weight = half.weight
        self.sums: Sums = {}

    def forward(self, tokens: Tensor) -> Tensor:
        out = functional.embedding(tokens, self.weight.detach()).requires_grad_()
        out.register_hook(partial(self.add, tokens[0]))
        return out

    def add(self, tokens: Tensor, gradient: Tensor) -> None:
        self.sums[self.weight].index_add_(0, tokens, gradient[0].float())


class Twin:
    """The fp16 model of the reference."""

    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder).half()
        self._parameters = list(self._model.parameters())
        self._wide: list[WideLinear | WideLookup] = []
        self._widen(self._model)

    def empty_sums(self) -> Sums:
        return {parameter: torch.zeros(parameter.shape) for parameter in self._parameters}

    def loss(self, tokens: Tensor, sums: Sums) -> Tensor:
        """Returns one sequence's sum of token losses; backward adds the gradients to `sums`."""
        for layer in self._wide:
            layer.sums = sums
        logits = self._model(tokens[None], None).float()[0]
        loss: Tensor = CrossEntropy.apply(logits, tokens[1:])
        return loss

    def backward(self, loss: Tensor, sums: Sums) -> None:
        torch.autograd.backward(loss)
        for parameter, total in sums.items():
            if parameter.grad is not None:  # a norm's gradient: autograd computes it in fp16
                total += parameter.grad
                parameter.grad = None

    @torch.no_grad()
    def copy_(self, masters: Sequence[Tensor]) -> None:
        for parameter, master in zip(self._parameters, masters, strict=True):
            parameter.copy_(master)

    def _widen(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear | nn.Embedding):
                wide = WideLinear(child) if isinstance(child, nn.Linear) else WideLookup(child)
                self._wide.append(wide)
                setattr(module, name, wide)
            else:
                self._widen(child)


def load_model(folder: Path) -> StageModel:
    shards, family = folder / "shards" / "model", MODELS["gptneox"].load()
    config = family.load_config(shards)
    model = StageModel(family, config, range(LAYERS + 2), device="cpu")
    load_shards_(model, shards, family, config)
    return model
