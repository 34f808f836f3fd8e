"""Every flag of every entry script: its help, its default, its checks. Needs no torch.

A mistake is a ValueError whose text is one line; `parse_*` turns it into that line on stderr and
exit status 2. What several flags must agree on is checked right after parsing (arguments.checks).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arguments.checks import NOT_BUILT_FLAGS, check_flags, fill_defaults
from arguments.parser import OneLineParser, layers, real, refuse, size, switch, whole
from modules.registry import MODELS
from pipeline_parallel.schedule.schedules import SCHEDULES

MAX_RATE = 1e6  # beyond it a weight is no fp32 number after one step
MAX_SECONDS = 1e9  # what the system's clocks and locks can wait for


def _add_switch(group: Any, flag: str, help_text: str, default: bool | None) -> None:
    group.add_argument(
        flag,
        type=switch,
        nargs="?",
        const=True,
        default=default,
        metavar="true|false",
        help=help_text,
    )


def train_parser() -> argparse.ArgumentParser:
    """The flags of dist_clm_train.py."""
    parser = OneLineParser(
        "Fine-tunes a model cut into layer-sharded stages; one process per rank."
    )
    _add_model_flags(parser.add_argument_group("model"))
    _add_process_flags(parser.add_argument_group("processes and network"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_precision_flags(parser.add_argument_group("precision and memory"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_output_flags(parser.add_argument_group("checkpoints and logging"))
    later = parser.add_argument_group("not built yet", "Parsed, and refused until they are built.")
    for flag, help_text in NOT_BUILT_FLAGS.items():
        later.add_argument(flag, nargs="?", const="true", default=argparse.SUPPRESS, help=help_text)
    return parser


def _add_model_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--model-name", required=True, type=Path, help="folder of layer shards, on each rank's disk"
    )
    add("--tokenizer-name", help="folder or hub name; default: --model-name")
    add("--model-type", required=True, choices=sorted(MODELS), help="model family")
    add(
        "--num-layers",
        required=True,
        type=layers(auto=True),
        help="layers per stage, of which the last may have fewer; or a list of each stage's, as "
        "5,3; or auto: the split whose slowest stage has the fewest multiply-adds",
    )
    add("--embedding-dim", required=True, type=whole(1), help="hidden size, as config.json has it")
    _add_switch(
        group, "--load-pretrained-model", "false: random weights from config.json and --seed", True
    )


def _add_process_flags(group: Any) -> None:
    add = group.add_argument
    add("--dist-url", help="where rank 0 listens; default: tcp://127.0.0.1:7033")
    add("--world-size", type=whole(1), help="processes in all; default: 1")
    add("--rank", type=whole(0), help="this process; default: 0")
    add("--pipeline-group-size", type=whole(1), default=1, help="stages of a pipeline")
    add("--data-group-size", type=whole(1), default=1, help="pipelines")
    add("--net-interface", help="network interface; default: the one that leads to rank 0")
    add("--cuda-id", type=whole(0), help="this process's GPU; default: 0")
    _add_switch(group, "--use-cuda", "default: true where there is a GPU", None)
    add(
        "--dist-backend",
        choices=("cupy_nccl", "nccl", "gloo"),
        help="activations and gradients between stages; nccl is torch's own, without CuPy; "
        "default: cupy_nccl, on CPU gloo",
    )
    add(
        "--dp-backend",
        choices=("nccl", "gloo"),
        help="gradients between replicas; nccl is torch's own where --dist-backend is nccl, else "
        "CuPy's; default: nccl, on CPU gloo",
    )
    add("--job-id", default="0", help="tells this job from others at the same --dist-url")
    add(
        "--job-token-file",
        type=Path,
        help="file with a secret that only this job's ranks have, each on its own disk: without it "
        "who knows --job-id can join",
    )
    add(
        "--join-timeout",
        type=real(positive=True, at_most=MAX_SECONDS),
        default=300.0,
        help="seconds for all ranks to meet",
    )
    add(
        "--dist-timeout",
        type=real(positive=True, at_most=MAX_SECONDS),
        default=300.0,
        help="seconds that one operation may wait for a peer, at least 5",
    )
    _add_switch(
        group,
        "--check-cluster",
        "meet, compare the machines, measure devices and links, "
        "print what to expect, and end; reads no weights and no data",
        False,
    )


def _add_training_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--optimizer",
        choices=("adam", "8bit-adam"),
        default="adam",
        help="adam is AdamW; 8bit-adam needs bitsandbytes",
    )
    add(
        "--total-steps",
        required=True,
        type=whole(1),
        help="iterations; --gradient-accumulate-step of them make one update",
    )
    add("--warmup-steps", type=whole(0), default=0, help="updates of linear warm-up")
    add(
        "--lr",
        type=real(at_most=MAX_RATE),
        default=1e-5,
        help="learning rate at the end of the warm-up",
    )
    add(
        "--lr-schedule",
        choices=("linear", "cosine", "constant"),
        default="linear",
        help="after the warm-up",
    )
    add("--min-lr", type=real(), default=0.0, help="where the schedule ends")
    add(
        "--weight-decay",
        type=real(at_most=MAX_RATE),
        default=0.01,
        help="of matrices; biases and norms have none",
    )
    add(
        "--max-grad-norm",
        type=real(positive=True, finite=False),
        default=1.0,
        help="gradient norm to clip to; inf: never",
    )
    add("--batch-size", type=whole(1), default=8, help="sequences per pipeline and iteration")
    add("--micro-batch-size", type=whole(1), default=1, help="sequences per microbatch")
    add("--gradient-accumulate-step", type=whole(1), default=1, help="iterations per update")
    add("--dp-mode", choices=("allreduce",), default="allreduce", help="how replicas agree")
    add("--pp-mode", choices=tuple(SCHEDULES), default="gpipe", help="pipeline schedule")
    _add_switch(group, "--recompute", "recompute a block's activations in backward", True)
    add("--seed", type=whole(0), default=42, help="of data order, dropout and random weights")
    add("--train-warmup-steps", type=whole(0), help="accepted from old scripts; does nothing")


def _add_precision_flags(group: Any) -> None:
    add = group.add_argument
    _add_switch(group, "--fp16", "compute in fp16, weights and moments in fp32", False)
    _add_switch(group, "--bf16", "compute in bf16, weights and moments in fp32", False)
    add(
        "--cpu-matmul",
        choices=("auto", "default", "onednn"),
        default="auto",
        help="what multiplies fp32 matrices on a CPU: torch's default (MKL) or oneDNN; auto: what "
        "the checkpoint was made with, else oneDNN on AMD processors with AVX-512",
    )
    add("--loss-scale", type=real(), default=0.0, help="fp16: a constant loss scale; 0: dynamic")
    add(
        "--initial-loss-scale",
        type=real(positive=True),
        default=32768.0,
        help="fp16: the first dynamic scale",
    )
    add(
        "--min-loss-scale",
        type=real(positive=True),
        default=1.0,
        help="fp16: the smallest dynamic scale",
    )
    add(
        "--loss-scale-window",
        type=whole(1),
        default=1000,
        help="fp16: clean updates in a row before the scale doubles",
    )
    add("--hysteresis", type=whole(1), default=2, help="fp16: overflows before the scale halves")
    add(
        "--max-skipped-updates",
        type=whole(1),
        default=50,
        help="fp16: overflows in a row that end the run, with a checkpoint",
    )
    _add_switch(group, "--use-offload", "master weights and moments in host memory", False)
    add(
        "--zero-stage",
        type=int,
        choices=(0, 1),
        default=0,
        help="1: each replica keeps its share of master weights and moments",
    )
    _add_switch(
        group,
        "--plan",
        "print what each stage will need, and end; needs config.json alone: no "
        "weights, no data, no other rank, and with --use-cuda true no GPU",
        False,
    )
    add(
        "--device-memory",
        type=size,
        metavar="SIZE",
        help="with --plan: what a device has, as 24GB (10^9 bytes) or 24GiB (2^30); where a stage "
        "needs more, the flags that help are told, and the exit status is 1",
    )
    _add_switch(
        group,
        "--measure-memory",
        "tell at the end the most that tensors took on each rank, "
        "beside what --plan says; on a CPU the run takes longer",
        False,
    )


def _add_data_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--task-name",
        required=True,
        help="a[:weight],b[:weight],...: each a .jsonl, .jsonl.zst, .jsonl.gz or .parquet file, a "
        "folder of them, a data set saved to disk by datasets, a hub name (org/name or org/name/"
        "configuration), or a registered task (cot, natural_instructions or ni, p3, pile); only "
        "rank 0 needs the files",
    )
    add("--seq-length", type=whole(2), default=2048, help="tokens of a block")
    add(
        "--doc-separator",
        help="text put before each document, instead of an end-of-text token "
        "after it; a newline is written $'\\n' in bash",
    )
    add(
        "--train-on",
        choices=("all", "completion"),
        default="all",
        help="completion: the loss is over completions and what the assistant or bot says alone; "
        "texts that are no conversation are trained whole",
    )
    add(
        "--pack",
        choices=("concat", "document"),
        default="concat",
        help="concat: documents end to end, and a token sees all before it in its block; document: "
        "attention and positions stay inside a document, and none is cut that fits into a block",
    )
    add(
        "--data-workers",
        type=whole(0),
        default=1,
        help="processes that tokenize ahead of training, on rank 0; 0: training's own",
    )
    add(
        "--bad-lines",
        choices=("error", "skip"),
        default="error",
        help="what a line does that is no document: end the run, or be left out and named in "
        "bad_lines.txt in --checkpoint-path",
    )
    add(
        "--max-bad-share",
        type=real(at_most=1.0),
        default=0.01,
        help="with --bad-lines skip: so many bad lines end the run, as a share of the lines read "
        "(at least of 1000)",
    )
    add(
        "--preview-data",
        type=whole(1),
        metavar="N",
        help="print the first N blocks as text, what is trained in green, and the mixture in "
        "numbers, and end; needs no weights and no other rank",
    )
    add(
        "--evaluation-data",
        help="[name=]source,[name=]source,...: each a file, folder or task, as of --task-name, to "
        "measure the held-out loss on; a set's name is that of its file, folder or task where none "
        "is given",
    )
    add(
        "--evaluation-steps",
        type=whole(0),
        default=0,
        help="evaluate every so many iterations; 0: only before the first and after the last",
    )
    add("--evaluation-num-batch", type=whole(1), help="batches of each set; default: all")


def _add_output_flags(group: Any) -> None:
    add = group.add_argument
    add("--checkpoint-path", type=Path, help="default: model_checkpoints/<model folder's name>")
    add(
        "--checkpoint-steps",
        type=whole(0),
        default=0,
        help="save every so many iterations; 0: only at the end",
    )
    add(
        "--keep-checkpoints",
        type=whole(1),
        metavar="N",
        help="only the newest N stay, once a newer one is whole; default: all",
    )
    add(
        "--keep-optimizer-states",
        type=whole(1),
        metavar="N",
        help="only the newest N checkpoints keep their optimizer state; older ones can be "
        "converted, but training cannot go on from them; default: all",
    )
    _add_switch(
        group,
        "--async-checkpoint",
        "training stops for a copy of its state in host memory alone, which is written beside it",
        False,
    )
    add(
        "--checkpoint-failure",
        choices=("warn", "fatal"),
        default="warn",
        help="what a save does that fails, of a full disk for example: warn, and training goes on, "
        "or end the run; the last save's failure always ends it",
    )
    _add_switch(group, "--load-checkpoint", "resume from --checkpoint-path if it has one", True)
    add(
        "--grace-seconds",
        type=real(positive=True, at_most=MAX_SECONDS),
        default=300.0,
        help="seconds after SIGTERM, SIGINT or SIGUSR1 for the update to end and be saved, before "
        "exit status 75; later, 1",
    )
    add("--project-name", default="dist-clm-train", help="Weights & Biases project")
    add(
        "--profiling",
        choices=("no-profiling", "tidy_profiling"),
        default="no-profiling",
        help="tidy_profiling: a trace of every rank, and timeline.png of one step of all, in "
        "trace_json under the working directory",
    )


def parse_train(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """The checked flags of dist_clm_train.py; ends the process with status 2 on a mistake."""
    try:
        args = train_parser().parse_args(argv)
        fill_defaults(args, os.environ if environ is None else environ)
        check_flags(args)
    except ValueError as error:
        refuse(error)
    return args


def parse_convert_from_hf(family: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of convert_from_hf_<family>.py; ends the process with status 2 on a mistake."""
    parser = OneLineParser(f"Converts a Hugging Face {family} model to layer shards.")
    add = parser.add_argument
    add("--model-name", required=True, help="folder in the Hugging Face format, or hub name")
    add(
        "--save-dir",
        required=True,
        type=Path,
        help="the shards go to <save-dir>/<model name with / as _>",
    )
    add("--dtype", choices=("keep", "fp16", "bf16", "fp32"), default="keep", help="of the shards")
    return _parse_or_refuse(parser, argv)


def parse_convert_to_hf(family: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of convert_to_hf_<family>.py; ends the process with status 2 on a mistake."""
    parser = OneLineParser(f"Converts a {family} training checkpoint to the Hugging Face format.")
    add = parser.add_argument
    add(
        "--ckpt-path",
        required=True,
        type=Path,
        help="a step's folder, or the --checkpoint-path of training for the latest",
    )
    add("--save-path", required=True, type=Path, help="the folder to write")
    add("--n-stages", type=whole(1), help="stages of the run; needed where no meta.json tells")
    add(
        "--n-layer-per-stage",
        type=layers(auto=False),
        help="layers per stage, or a list of each stage's; needed likewise",
    )
    add("--config-name", help="folder or hub name of config and tokenizer, for checkpoints without")
    _add_switch(parser, "--fp16", "write fp16, whatever the checkpoint holds", False)
    _add_switch(
        parser, "--verify", "compare the result's logits with the stages', layer by layer", False
    )
    return _parse_or_refuse(parser, argv)


def _parse_or_refuse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    try:
        return parser.parse_args(argv)
    except ValueError as error:
        refuse(error)
