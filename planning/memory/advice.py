"""Which flags make a run need less memory, in the order of how much, for this very run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from copy import copy
from importlib.util import find_spec
from typing import Any, NamedTuple

from arguments.checks import fixed_flags
from checkpoint.steps.folder import any_steps
from modules.families.base import Family
from modules.registry import MODELS
from pipeline_parallel.partition.balance import choose_split, module_work
from pipeline_parallel.partition.split import AUTO, Split
from planning.memory.dry_run import DryRun


class Change(NamedTuple):
    """Flags as a user would write them; bytes that they save, and the peak that is left.

    starts_anew: the checkpoints in --checkpoint-path are not ones to go on from with these flags.
    """

    flags: str
    saved: int
    peak: int
    starts_anew: bool


def helpful_changes(
    args: argparse.Namespace,
    family: Family,
    config: Any,
    layers: Split,
    *,
    cuda: bool,
    rank: int,
    peak: int,
) -> list[Change]:
    """Each change by itself that lets the process of this rank need less than `peak` bytes, the one
    that saves most first. More stages are taken by their largest."""
    found, has_steps = [], any_steps(args.checkpoint_path)
    for flags, changed in _variants(args):
        split, ranks = layers, [rank]
        if changed.pipeline_group_size != args.pipeline_group_size:
            if changed.pipeline_group_size > config.num_hidden_layers:
                continue
            split, ranks = _even(changed, config), _largest(changed.pipeline_group_size)
        rehearsal = DryRun(changed, family, config, split, cuda=cuda)
        left = max(rehearsal.of_rank(one).peak for one in ranks)
        starts_anew = has_steps and fixed_flags(changed) != fixed_flags(args)
        found.append(Change(flags, peak - left, left, starts_anew))
    return sorted((one for one in found if one.saved > 0), key=lambda one: -one.saved)


def _variants(args: argparse.Namespace) -> Iterator[tuple[str, argparse.Namespace]]:
    """Each change of a flag that may help, and the flags with it."""
    if not args.recompute:
        yield "--recompute true", _with(args, recompute=True)
    if args.pp_mode != "1f1b":
        yield "--pp-mode 1f1b", _with(args, pp_mode="1f1b")
    if args.micro_batch_size > 1:
        yield "--micro-batch-size 1", _with(args, micro_batch_size=1)
    if args.data_group_size > 1 and args.zero_stage == 0:
        yield "--zero-stage 1", _with(args, zero_stage=1)
    if not args.use_offload:
        yield "--use-offload", _with(args, use_offload=True)
    if args.optimizer != "8bit-adam" and find_spec("bitsandbytes") is not None:
        yield "--optimizer 8bit-adam", _with(args, optimizer="8bit-adam")
    if args.precision == "fp32":
        yield "--bf16", _with(args, bf16=True, precision="bf16")
    if args.async_checkpoint:
        yield "no --async-checkpoint", _with(args, async_checkpoint=False)
    stages = 2 * args.pipeline_group_size
    yield (
        f"--pipeline-group-size {stages} --num-layers auto",
        _with(
            args,
            pipeline_group_size=stages,
            world_size=stages * args.data_group_size,
            num_layers=AUTO,
        ),
    )


def _with(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    changed = copy(args)
    vars(changed).update(changes)
    return changed


def _largest(num_stages: int) -> list[int]:
    """The stages one of which needs most: at the ends, where embedding and head are and where
    schedules hold most, and beside them."""
    return sorted({0, 1, num_stages - 2, num_stages - 1})


def _even(args: argparse.Namespace, config: Any) -> Split:
    work = module_work(MODELS[args.model_type], config.to_dict(), tokens=args.seq_length)
    return choose_split(
        AUTO, work, num_stages=args.pipeline_group_size, model_layers=config.num_hidden_layers
    )
