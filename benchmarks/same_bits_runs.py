"""Table of the runs that same_bits.py trains, with their small models and texts.

Models and texts are generated from seeds, without the project's own code.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

EOS = "<|endoftext|>"
LAYERS = 4  # of every model
GLOBAL_BATCH = 8  # sequences per iteration of every run, over all replicas


class Model(NamedTuple):
    """One model: its family, hidden size, vocabulary size, and the other values of its config."""

    family: str
    hidden: int
    vocabulary: int
    config: dict[str, Any]


_NEOX = {"num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 64}
_GPTJ = {"n_head": 8, "rotary_dim": 4, "n_positions": 64}
MODELS = {
    "quickstart": Model("gptneox", 192, 2048, {
        "num_attention_heads": 6, "intermediate_size": 768, "max_position_embeddings": 256,
    }),
    "neox": Model("gptneox", 64, 384, _NEOX),
    "gptj": Model("gptj", 64, 384, _GPTJ),
    "neox-dropout": Model("gptneox", 64, 384, {
        **_NEOX, "use_parallel_residual": False, "attention_dropout": 0.1, "hidden_dropout": 0.2,
    }),
    "gptj-dropout": Model("gptj", 64, 384, {
        **_GPTJ, "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.2,
    }),
}  # fmt: skip


class Run(NamedTuple):
    """One run: one or more starts of dist_clm_train.py that share a folder of checkpoints.

    model: a key of MODELS.
    starts: for each start, P x R and the flags in addition to COMMON.
    killed_at: when metrics.jsonl has this number of lines, the first start gets SIGKILL; 0: never.
    overflows: same_bits.py checks that the run skips some of its updates, but not all.
    is_converted: the last checkpoint is converted to the Hugging Face format.
    is_fresh: each process is a new Python interpreter, not a fork (see same_bits_ranks.py).
    """

    name: str
    model: str
    starts: tuple[str, ...]
    killed_at: int = 0
    overflows: bool = False
    is_converted: bool = False
    is_fresh: bool = False


# Every run has these flags; the flags of its start come after them.
COMMON = (
    "--use-cuda false --task-name train.jsonl --seq-length 32 --micro-batch-size 1 "
    "--recompute false --total-steps 8 --warmup-steps 2 --lr 1e-2 --data-workers 0"
)
# The command of example_scripts/quickstart.py, with other steps and one data worker. The run
# evaluates after each quarter and saves halfway; a few steps later it is killed.
_QUICKSTART = (
    "2x2 --seq-length 128 --micro-batch-size 2 --total-steps 60 --warmup-steps 10 --lr 3e-3 "
    "--evaluation-data held_out.jsonl --evaluation-steps 15 --checkpoint-steps 30 "
    "--data-workers 1"
)
_LONG_DOCUMENTS = "--pack document --pp-mode zb-h1 --seq-length 64"
_ACCUMULATE = "2x1 --gradient-accumulate-step 2 --train-on completion --task-name chat.jsonl"
_FP16 = "--fp16 --initial-loss-scale 16777216 --hysteresis 1 --loss-scale-window 3"
_SETS = "--evaluation-data near=held_out.jsonl,far=other.jsonl --evaluation-num-batch 4"
_SHARDED = "--zero-stage 1 --bf16 --optimizer 8bit-adam"
_BESIDE = "--checkpoint-steps 2 --keep-checkpoints 2 --async-checkpoint true"
_RANDOM = "--load-pretrained-model false --lr-schedule cosine --min-lr 1e-4 --seed 7"

RUNS = (
    Run("quickstart", "quickstart", (_QUICKSTART, _QUICKSTART), killed_at=33, is_converted=True,
        is_fresh=True),
    # families, shapes and schedules, in fp32
    Run("neox-1x1-gpipe", "neox", ("1x1 --pp-mode gpipe",)),
    Run("neox-2x1-1f1b", "neox", ("2x1 --pp-mode 1f1b",)),
    Run("neox-4x1-zb-h1", "neox", ("4x1 --pp-mode zb-h1",)),
    Run("neox-2x2-gpipe", "neox", ("2x2 --pp-mode gpipe",)),
    Run("neox-1x2", "neox", ("1x2",)),
    Run("gptj-1x1", "gptj", ("1x1",)),
    Run("gptj-2x2-zb-h1", "gptj", ("2x2 --pp-mode zb-h1",)),
    Run("gptj-4x1-1f1b", "gptj", ("4x1 --pp-mode 1f1b",)),
    Run("long-attention-2x1", "gptj", ("2x1 --seq-length 64",)),  # seq length: 8 times head size
    Run("split-3-1", "neox", ("2x1 --num-layers 3,1",)),
    Run("split-auto", "gptj", ("2x1 --num-layers auto --pp-mode zb-h1",)),
    Run("random-weights-cosine", "neox", (f"1x1 {_RANDOM}",)),
    # precision, optimizer and memory
    Run("bf16-2x2", "neox", ("2x2 --bf16",)),
    Run("fp16-overflows-2x1", "neox", (f"2x1 --total-steps 10 {_FP16}",), overflows=True),
    Run("fp16-constant-scale", "gptj", ("1x1 --fp16 --loss-scale 128",)),
    Run("8bit-adam-2x1", "neox", ("2x1 --optimizer 8bit-adam",)),
    Run("zero-1x2", "neox", ("1x2 --zero-stage 1",)),
    Run("zero-bf16-2x2", "neox", ("2x2 --zero-stage 1 --bf16",)),
    Run("offload-bf16-2x1", "gptj", ("2x1 --use-offload --bf16",)),
    Run("recompute-2x1", "neox", ("2x1 --recompute true",)),
    Run("recompute-zb-h1-2x1", "gptj", ("2x1 --recompute true --pp-mode zb-h1",)),
    Run("dropout-neox-2x1", "neox-dropout", ("2x1",)),
    Run("dropout-gptj-1x2", "gptj-dropout", ("1x2 --recompute true",)),
    # data
    Run("pack-document-2x1", "neox", ("2x1 --pack document",)),
    Run("pack-document-dropout", "gptj-dropout", (f"2x1 {_LONG_DOCUMENTS}",)),
    Run("accumulate-completion-2x1", "neox", (_ACCUMULATE,)),
    Run("evaluation-2x1", "gptj", (f"2x1 --evaluation-steps 3 {_SETS}",)),
    Run("mixture-2x1", "neox", ("2x1 --task-name train.jsonl:0.7,other.jsonl:0.3",)),
    Run("separator-workers", "neox", ("1x1 --doc-separator # --data-workers 2",)),
    # two starts: the second resumes from the checkpoint of the first
    Run("resume-2x2", "neox", (f"2x2 --total-steps 4 {_BESIDE}", f"2x2 {_BESIDE}")),
    Run("resume-fp16", "gptj", (f"1x1 --total-steps 4 {_FP16}", f"1x1 {_FP16}"), overflows=True),
    Run("reshard-2-to-4", "neox", ("2x1 --total-steps 4", "4x1")),
    Run("reshard-2-to-1", "gptj", ("2x1 --total-steps 4", "1x1"), is_converted=True),
    Run("reshard-2x1-to-1x2", "neox", (f"2x1 --total-steps 4 {_SHARDED}", f"1x2 {_SHARDED}")),
)  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Writes the texts to `folder`, and each model in the Hugging Face format to hf/<name>."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    texts = _documents(1, 3000)
    _write(folder / "train.jsonl", ({"text": text} for text in texts))
    _write(folder / "other.jsonl", ({"text": text} for text in _documents(2, 300)))
    _write(folder / "held_out.jsonl", ({"text": text} for text in _documents(3, 60)))
    turns = zip(_documents(4, 300), _documents(5, 300), strict=True)
    _write(folder / "chat.jsonl", ({"prompt": a, "completion": f" {b}"} for a, b in turns))
    for name, model in MODELS.items():
        tokenizer = _train_tokenizer(texts, model.vocabulary)
        _make_model(model, tokenizer).save_pretrained(folder / "hf" / name)
        tokenizer.save_pretrained(folder / "hf" / name)


def _documents(seed: int, count: int) -> list[str]:
    """Returns texts of 4 to 40 invented words; some words are far more frequent than others."""
    letters = random.Random(0)
    words = [
        "".join(letters.choice("bdfgklmnprst") + letters.choice("aeiou") for _ in range(length))
        for length in (1, 2, 3, 4)
        for _ in range(300)
    ]
    letters.shuffle(words)
    weights = [1 / (place + 1) for place in range(len(words))]
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, weights, k=draw.randint(4, 40))) for _ in range(count)]


def _write(path: Path, lines: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _train_tokenizer(texts: list[str], size: int) -> Any:
    """Trains a byte-level BPE tokenizer of at most `size` tokens; one token is EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def _make_model(model: Model, tokenizer: Any) -> Any:
    """Builds a Hugging Face model with random biases and norms: defaults of 0 and 1 hide errors."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    common = {"vocab_size": len(tokenizer), "bos_token_id": end, "eos_token_id": end}
    if model.family == "gptneox":
        size = {"hidden_size": model.hidden, "num_hidden_layers": LAYERS}
        made = GPTNeoXForCausalLM(GPTNeoXConfig(**common, **size, **model.config))
    else:
        size = {"n_embd": model.hidden, "n_layer": LAYERS}
        made = GPTJForCausalLM(GPTJConfig(**common, **size, **model.config))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return made
