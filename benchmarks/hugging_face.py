"""The peer of one process: a plain loop over Hugging Face's model, as its Trainer runs it.

With bf16 the weights stay in fp32, and forward and backward run under autocast. AdamW is torch's
fused one. As on our side, matrices decay, and the norm of the gradients is clipped.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.work import CPU, EPS, LR, MAX_NORM, WEIGHT_DECAY, Workload


class HuggingFaceLoop:
    """Hugging Face's model of a workload, on one device; each step trains on the same batch."""

    def __init__(self, work: Workload, device: torch.device = CPU) -> None:
        self._work, self._device = work, device
        self._model = work.model(device).train()
        if work.recompute == "full":
            options = {"use_reentrant": False}
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        self._rows = work.rows().to(device).split(work.micro_batch)
        self._parameters: list[nn.Parameter] = list(self._model.parameters())
        matrices = [p for p in self._parameters if p.dim() >= 2]
        others = [p for p in self._parameters if p.dim() < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=LR,
            eps=EPS,
            fused=True,
        )

    def step(self) -> float:
        total = torch.zeros((), device=self._device)
        for rows in self._rows:
            loss = self._loss(rows) / len(self._rows)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
        self._adamw.step()
        self._adamw.zero_grad()
        return float(total)

    def _loss(self, rows: Tensor) -> Tensor:
        cast: AbstractContextManager[Any] = nullcontext()
        if self._work.precision == "bf16":
            cast = torch.autocast(self._device.type, torch.bfloat16)
        with cast:
            loss: Tensor = self._model(input_ids=rows, labels=rows, use_cache=False).loss
        return loss
