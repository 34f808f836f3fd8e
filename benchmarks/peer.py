"""The peer of our pipeline in `pipeline.py`: torch's own pipelining and DistributedDataParallel.

The peer uses Hugging Face's layers and the schedules of torch.distributed.pipelining. Like our
side, it sends messages over gloo, applies weight decay to the same weights, and clips the gradients
of both stages by their common norm. It is written as a careful user of torch would write it.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from benchmarks.work import EPS, LR, MAX_NORM, WEIGHT_DECAY, Workload
from comm.topology import Topology

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}
CPU = torch.device("cpu")


class HuggingFaceStage(nn.Module):
    """A stage of Hugging Face's GPT-NeoX: layers, embedding (stage 0) and head (last stage)."""

    def __init__(self, work: Workload, stage: int) -> None:
        super().__init__()
        model = work.model()
        first = sum(work.split[:stage])
        last = stage == len(work.split) - 1
        self.embedding = model.gpt_neox.embed_in if stage == 0 else None
        self.layers = model.gpt_neox.layers[first : first + work.split[stage]]
        self.rotary = model.gpt_neox.rotary_emb
        self.norm = model.gpt_neox.final_layer_norm if last else None
        self.head = model.lm_head if last else None
        self.recompute = work.recompute == "full"
        self.register_buffer("positions", torch.arange(work.tokens).unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        rotary = self.rotary(x, self.positions)
        for layer in self.layers:
            if self.recompute:
                x = checkpoint(
                    layer,
                    x,
                    position_embeddings=rotary,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = layer(x, position_embeddings=rotary)
        if self.head is None or self.norm is None:
            return x
        logits: Tensor = self.head(self.norm(x))
        return logits


def mean_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Returns the mean cross entropy between each position's logits and the next token."""
    return functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten())


class Update:
    """The update of a stage: it clips the gradients, and then runs AdamW.

    If the model is in half precision, AdamW changes fp32 masters of the weights.
    `fused`: whether torch's fastest AdamW is used; else torch's default AdamW.
    `stages`: whether the norm for the clipping is the norm over all stages.
    """

    def __init__(self, module: nn.Module, *, fused: bool, stages: bool) -> None:
        self._parameters = list(module.parameters())
        self._half = self._parameters[0].dtype != torch.float32
        self._masters = self._parameters
        if self._half:
            self._masters = [nn.Parameter(p.detach().float()) for p in self._parameters]
        matrices = [p for p in self._masters if p.dim() >= 2]
        others = [p for p in self._masters if p.dim() < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": WEIGHT_DECAY},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=LR,
            eps=EPS,
            fused=True if fused else None,
        )
        self._stages = stages

    @torch.no_grad()
    def step(self) -> None:
        if self._half:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                assert parameter.grad is not None
                master.grad = parameter.grad.float()
        gradients = [m.grad for m in self._masters if m.grad is not None]
        total = nn.utils.get_total_norm(gradients).square()
        if self._stages:
            dist.all_reduce(total)
        nn.utils.clip_grads_with_norm_(self._masters, MAX_NORM, total.sqrt())
        self._adamw.step()
        if self._half:
            for master, parameter in zip(self._masters, self._parameters, strict=True):
                parameter.copy_(master)
        for held in [*self._masters, *self._parameters]:
            held.grad = None


class TorchPipeline:
    """One stage of torch's pipelining under the schedule named `schedule`."""

    def __init__(self, work: Workload, schedule: str, topology: Topology, *, fused: bool) -> None:
        module = HuggingFaceStage(work, topology.stage)
        if work.precision == "bf16":
            frequencies = module.rotary.inv_freq.clone()
            module = module.bfloat16()
            module.rotary.inv_freq = frequencies  # transformers keeps them in fp32
        stage = PipelineStage(module, topology.stage, topology.num_stages, CPU)
        make: Any = SCHEDULES[schedule]
        self._schedule = make(stage, n_microbatches=work.batch, loss_fn=mean_loss)
        self._rows, self._topology = work.rows(), topology
        self._update = Update(module, fused=fused, stages=True)

    def step(self) -> float:
        losses: list[Tensor] = []
        given = (self._rows,) if self._topology.is_first else ()
        if self._topology.is_last:
            self._schedule.step(*given, target=self._rows, losses=losses, return_outputs=False)
        else:
            self._schedule.step(*given, return_outputs=False)
        self._update.step()
        return float(torch.stack(losses).detach().mean()) if losses else math.nan


class TorchDataParallel:
    """One replica of the complete model under DistributedDataParallel."""

    def __init__(self, work: Workload, topology: Topology, *, fused: bool) -> None:
        whole = work.on(split=(work.layers,))
        self._module = DistributedDataParallel(
            HuggingFaceStage(whole, 0), gradient_as_bucket_view=True, broadcast_buffers=False
        )
        self._rows = work.rows(topology.replica).split(1)
        self._update = Update(self._module, fused=fused, stages=False)

    def step(self) -> float:
        total = torch.zeros(())
        for index, row in enumerate(self._rows):
            last = index + 1 == len(self._rows)
            sync: Callable[[], Any] = nullcontext if last else self._module.no_sync
            with sync():
                loss = mean_loss(self._module(row), row) / len(self._rows)
                loss.backward()
            total += loss.detach()
        self._update.step()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()
