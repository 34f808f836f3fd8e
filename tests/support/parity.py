"""Flags of the parity tests, and the reference: a Hugging Face model trained in one process.

The reference trains on the same blocks, in plain torch with one optimizer and one loss. Of our code
it uses only the reader of the blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from tasks.mixture import Pack
from tasks.source_spec import SourceSpec
from tasks.stream import open_training_stream
from tests.support.data import tokenizer
from tests.support.flags import flags_of

TOLERANCE = 1e-5  # relative; the project's tolerance in fp32 on CPU
UPDATES, ROWS, TOKENS, LAYERS, LR, WARMUP = 20, 4, 24, 5, 1e-3, 3
SHORT = 4  # updates of runs that are compared with each other, bit for bit
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
MODELS_TRIED: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("gptneox", {"num_hidden_layers": LAYERS}),
    "neox-sequential": ("gptneox", {"num_hidden_layers": LAYERS, "use_parallel_residual": False}),
    "gptj": ("gptj", {"n_layer": LAYERS}),
    "llama": ("llama", {"num_hidden_layers": LAYERS}),
    "mistral": ("mistral", {"num_hidden_layers": LAYERS, "head_dim": 12}),
    "qwen2": ("qwen2", {"num_hidden_layers": LAYERS}),
    "qwen3": ("qwen3", {"num_hidden_layers": LAYERS, **WINDOW}),
}
DROPOUT = (
    "gptneox",
    {"num_hidden_layers": LAYERS, "hidden_dropout": 0.1, "attention_dropout": 0.1},
)


def layers_of_a_stage(stages: int, replicas: int) -> str:
    """Returns --num-layers for 5 layers; for 2 stages it is 3: the first holds 3, the last 2."""
    return {1: "5", 2: "3", 4: "2,1,1,1"}[stages]


def rows_of_a_replica(stages: int, replicas: int) -> int:
    return ROWS // replicas


def rows_of_a_microbatch(stages: int, replicas: int) -> int:
    """Returns the number of rows in a microbatch; in every shape, a batch has two microbatches."""
    return ROWS // replicas // 2


def flags(
    folder: Path, name: str, family: str, accumulate: int, *, updates: int = UPDATES
) -> dict[str, Any]:
    return flags_of(f"""
        --model-name {folder}/shards/{name} --model-type {family} --embedding-dim 32
        --task-name {folder}/a.jsonl:0.3,{folder}/b.jsonl:0.7 --seq-length {TOKENS}
        --recompute {str(accumulate == 1).lower()} --gradient-accumulate-step {accumulate}
        --total-steps {updates * accumulate} --warmup-steps {WARMUP} --lr {LR}
        --max-grad-norm 1.0 --weight-decay 0.1
    """) | {
        "num-layers": layers_of_a_stage,
        "batch-size": rows_of_a_replica,
        "micro-batch-size": rows_of_a_microbatch,
    }


def blocks(folder: Path, pack: Pack = "concat") -> Any:
    specs = [SourceSpec(str(folder / "a.jsonl"), 0.3), SourceSpec(str(folder / "b.jsonl"), 0.7)]
    stream = open_training_stream(specs, tokenizer(), seq_len=TOKENS, seed=42, pack=pack)
    return (stream.next_block().token_ids for _ in count())


def reference(
    model: Any,
    stream: Iterator[Any],
    accumulate: int,
    max_norm: float = 1.0,
    labels_of: Callable[[Tensor], Tensor] = torch.clone,
    updates: int = UPDATES,
) -> tuple[list[float], list[float]]:
    """Trains `model` in one process; returns losses of iterations and gradient norms of updates.

    Each item of `stream` is the tokens of one block; `labels_of` makes labels from tokens.
    """
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.999),
        eps=1e-6,
    )
    schedule = get_linear_schedule_with_warmup(adamw, WARMUP, updates)
    losses, norms = [], []
    for _ in range(updates):
        for _ in range(accumulate):
            tokens = torch.from_numpy(np.stack(list(islice(stream, ROWS))))
            loss: Tensor = model(tokens, labels=labels_of(tokens)).loss
            torch.autograd.backward(loss / accumulate)
            losses.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        adamw.step()
        schedule.step()
        adamw.zero_grad()
    return losses, norms


def worst(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """Returns the largest relative difference of two lists that have None at the same indices."""
    errors = [0.0]
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            errors.append(abs(a - b) / abs(b))
    return max(errors)
