"""What flags must agree on, and the defaults that depend on each other. Needs no torch.

Every check raises ValueError with one line that names flags, their values and what was expected.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from comm.rendezvous.dist_url import parse_dist_url
from modules.registry import MODELS
from pipeline_parallel.partition.split import Split, check_length, check_split
from tasks.source_spec import parse_task_name

MIN_DIST_TIMEOUT = 5.0  # seconds; some times comm/collective_io.py's TELL_SECONDS
NOT_BUILT = "is not built yet"

# Flags that are parsed and refused until the part they belong to is built.
NOT_BUILT_FLAGS: dict[str, str] = {
    "--compile": "blocks through torch.compile",
}

# May differ from rank to rank: they name what one machine has, or what rank 0 alone reads.
OWN_FLAGS = frozenset(
    {
        "--rank",
        "--cuda-id",
        "--net-interface",
        "--dist-url",
        "--model-name",
        "--tokenizer-name",
        "--checkpoint-path",
        "--task-name",
        "--evaluation-data",
        "--use-cuda",
        "--project-name",
    }
)
# Must be the same on all ranks, which prove it (comm/rendezvous/job_key.py) and never tell it.
PROVEN_FLAGS = frozenset({"--job-id", "--job-token-file"})


# Flags that a resumed run must share with its checkpoint.
FIXED = (
    "model_type",
    "seq_length",
    "micro_batch_size",
    "gradient_accumulate_step",
    "optimizer",
    "task_name",
    "doc_separator",
    "seed",
)
# Flags that may change on resume, which is told in one line each. So may --pipeline-group-size and
# --num-layers, of which pipeline_parallel/partition/stage_split.py tells.
FREE = (
    "total_steps",
    "lr",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "batch_size",
    "pp_mode",
    "data_group_size",
    "checkpoint_steps",
    "checkpoint_failure",
    "async_checkpoint",
    "keep_checkpoints",
    "keep_optimizer_states",
    "bad_lines",
    "max_bad_share",
    "evaluation_data",
    "evaluation_steps",
    "evaluation_num_batch",
    "recompute",
    "tokenizer_name",
    "project_name",
    "net_interface",
    "dist_backend",
    "dp_backend",
    "join_timeout",
    "dist_timeout",
    "grace_seconds",
    "use_offload",
    "zero_stage",
    "lr_schedule",
    "min_lr",
    "loss_scale",
    "initial_loss_scale",
    "min_loss_scale",
    "loss_scale_window",
    "hysteresis",
    "max_skipped_updates",
)


def fixed_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run must share with its checkpoint, by the words of an error."""
    return {
        **{_flag(name): getattr(args, name) for name in FIXED},
        "the global batch (--batch-size x --data-group-size)": args.batch_size
        * args.data_group_size,
        "the precision": args.precision,
    }


def free_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What a resumed run may change, by flag."""
    return {_flag(name): getattr(args, name) for name in FREE}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def fill_defaults(args: argparse.Namespace, environ: Mapping[str, str]) -> None:
    """Fills what was left out, from torchrun's variables where it launched this process.

    Adds `start_id`, by which torchrun tells starts of the job from each other, and `agent_store`,
    whether torchrun's agent hosts the store.
    """
    launched = "TORCHELASTIC_RUN_ID" in environ
    given = environ if launched else {}
    for name, variable, default in (
        ("rank", "RANK", "0"),
        ("world_size", "WORLD_SIZE", "1"),
        ("cuda_id", "LOCAL_RANK", "0"),
    ):
        if getattr(args, name) is None:
            text = given.get(variable, default)
            if not text.isdecimal():
                raise ValueError(
                    f"torchrun's variable {variable} is {text!r}, expected a whole number"
                )
            setattr(args, name, int(text))
    args.agent_store = (
        launched and args.dist_url is None and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    )
    if args.dist_url is None:
        host, port = given.get("MASTER_ADDR", "127.0.0.1"), given.get("MASTER_PORT", "7033")
        args.dist_url = f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    args.start_id = ""
    if launched:
        restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        args.start_id = f"{environ['TORCHELASTIC_RUN_ID']}/{restart}"
    if args.tokenizer_name is None:
        args.tokenizer_name = str(args.model_name)
    if args.checkpoint_path is None:
        args.checkpoint_path = Path("model_checkpoints") / args.model_name.resolve().name


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for what the flags alone show to be wrong; every rank sees the same."""
    _check_built(args)
    _check_shape(args)
    _check_meeting(args)
    for flag, value, divides, whole_value in (
        ("--micro-batch-size", args.micro_batch_size, "--batch-size", args.batch_size),
        (
            "--gradient-accumulate-step",
            args.gradient_accumulate_step,
            "--total-steps",
            args.total_steps,
        ),
    ):
        if whole_value % value:
            raise ValueError(f"{flag} {value} does not divide {divides} {whole_value}")
    updates = args.total_steps // args.gradient_accumulate_step
    if args.warmup_steps > updates:
        raise ValueError(f"--warmup-steps {args.warmup_steps}: the run has only {updates} updates")
    _check_precision(args)
    if args.rank == 0 or args.world_size == 1:
        args.sources = parse_task_name(args.task_name)


def _check_built(args: argparse.Namespace) -> None:
    for flag in NOT_BUILT_FLAGS:
        value = getattr(args, _dest(flag), "false")
        if str(value).lower() != "false":
            raise ValueError(f"{flag} {NOT_BUILT}")


def _check_precision(args: argparse.Namespace) -> None:
    if args.fp16 and args.bf16:
        raise ValueError("--fp16 and --bf16 are both given: expected at most one of them")
    args.precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "fp32"
    if _scales_dynamically(args) and args.min_loss_scale > args.initial_loss_scale:
        raise ValueError(
            f"--min-loss-scale {args.min_loss_scale:g}: expected at most --initial-loss-scale "
            f"{args.initial_loss_scale:g}"
        )
    if args.min_lr > args.lr:
        raise ValueError(f"--min-lr {args.min_lr:g}: expected at most --lr {args.lr:g}")
    if args.min_lr and args.lr_schedule == "constant":
        raise ValueError(f"--min-lr {args.min_lr:g}: --lr-schedule constant falls to nothing lower")


def _scales_dynamically(args: argparse.Namespace) -> bool:
    return bool(args.fp16 and args.loss_scale == 0)


def doubts(args: argparse.Namespace) -> list[str]:
    """What is allowed and hardly meant, in a line each."""
    found = []
    if args.train_warmup_steps is not None:
        found.append("--train-warmup-steps does nothing; --warmup-steps sets the warm-up")
    if args.evaluation_steps and args.evaluation_data is None:
        found.append(
            f"--evaluation-steps {args.evaluation_steps} does nothing without --evaluation-data"
        )
    if args.device_memory is not None and not args.plan:
        found.append("--device-memory does nothing without --plan")
    if _scales_dynamically(args) and args.max_skipped_updates <= args.hysteresis:
        found.append(
            f"--max-skipped-updates {args.max_skipped_updates} ends the run before a lower loss "
            f"scale has been tried, which --hysteresis {args.hysteresis} overflows bring"
        )
    return found


def _check_shape(args: argparse.Namespace) -> None:
    stages, replicas = args.pipeline_group_size, args.data_group_size
    if args.world_size != stages * replicas:
        raise ValueError(
            f"--world-size {args.world_size} is not --pipeline-group-size {stages} times "
            f"--data-group-size {replicas}"
        )
    if args.rank >= args.world_size:
        raise ValueError(f"--rank {args.rank}: expected less than --world-size {args.world_size}")
    if isinstance(args.num_layers, Split):
        check_length(args.num_layers, stages)


def _check_meeting(args: argparse.Namespace) -> None:
    parse_dist_url(args.dist_url)
    if args.dist_timeout < MIN_DIST_TIMEOUT:
        raise ValueError(
            f"--dist-timeout {args.dist_timeout:g}: expected at least {MIN_DIST_TIMEOUT:g} "
            "seconds, for ranks that save tell each other every second that they are still at it"
        )


def check_model(args: argparse.Namespace) -> None:
    """Raises ValueError where the flags contradict the config.json of --model-name."""
    entry, path = MODELS[args.model_type], args.model_name / "config.json"
    if not args.model_name.is_dir():
        raise ValueError(f"--model-name {args.model_name}: no such folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model-name {args.model_name}: {path} is not readable: {error}"
        ) from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != entry.hf_model_type:
        raise ValueError(
            f"--model-type {args.model_type} needs model_type {entry.hf_model_type!r}, but {path} "
            f"has {found!r}"
        )
    hidden, layers, positions = (
        _config_number(config, path, key)
        for key in (entry.hidden_size, entry.num_layers, entry.max_positions)
    )
    if args.embedding_dim != hidden:
        raise ValueError(f"--embedding-dim {args.embedding_dim}, but {path} has {hidden}")
    if args.seq_length > positions:
        raise ValueError(f"--seq-length {args.seq_length}: {path} allows at most {positions}")
    check_split(args.num_layers, num_stages=args.pipeline_group_size, model_layers=layers)


def check_optimizer(args: argparse.Namespace) -> None:
    """Raises ValueError where this machine lacks what --optimizer needs."""
    if args.optimizer == "8bit-adam" and find_spec("bitsandbytes") is None:
        raise ValueError(
            "--optimizer 8bit-adam needs bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`"
        )


def _config_number(config: Mapping[str, Any], path: Path, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {key} is {value!r}, expected a whole number above 0")
    return value
