"""What is told where memory runs out: where, what was held, and which flags help, in order."""

from __future__ import annotations

import argparse
import gc
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from comm.topology import Topology
from common.text import in_units
from modules.families.base import Family
from monitor.out_of_memory import asked_for, causes, is_out_of_memory
from pipeline_parallel.partition.split import Split
from planning.memory.advice import Change, helpful_changes
from planning.memory.dry_run import DryRun, StageMemory


def explain_out_of_memory(
    where: str,
    error: BaseException,
    args: argparse.Namespace,
    family: Family,
    config: Any,
    layers: Split,
    *,
    topology: Topology,
    cuda: bool,
    announce: Callable[[str], object],
) -> str:
    """What to end with: `where` is the stage and what it was doing when `error` came, which
    `announce` is told first, for finding out what helps takes seconds.

    What the frames of `error` held is let go of first, for finding out takes some memory too.
    """
    asked = asked_for(error)
    told = f"{where}: out of memory" + (f" (it asked for {asked})" if asked else "")
    announce(told)
    _let_go(error)
    try:
        rehearsal = DryRun(args, family, config, layers, cuda=cuda)
        stage = rehearsal.of_rank(topology.rank)
        changes = helpful_changes(
            args, family, config, layers, cuda=cuda, rank=topology.rank, peak=stage.peak
        )
    except Exception as another:
        if not is_out_of_memory(another):
            raise
        return f"{told}; the same command with --plan tells which flags help"
    return f"{told}; {_held(stage)}; {_help(changes)}"


def _let_go(error: BaseException) -> None:
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)
    gc.collect()


def _held(stage: StageMemory) -> str:
    copied = f"{in_units(stage.copied)} of --async-checkpoint's copy, " if stage.copied else ""
    return (
        f"by --plan this rank holds {in_units(stage.weights)} of weights, "
        f"{in_units(stage.gradients)} of gradients, {in_units(stage.optimizer)} of masters and "
        f"moments, {copied}and up to {in_units(stage.activations)} of activations and what is "
        f"made on the way ({stage.held} microbatches): {in_units(stage.peak)}"
    )


def _help(changes: Sequence[Change]) -> str:
    if not changes:
        return "no flag makes it hold less"
    listed = ", ".join(f"{change.flags} ({_outcome(change)})" for change in changes)
    return f"what helps, most first: {listed}"


def _outcome(change: Change) -> str:
    return f"{in_units(change.saved)} less" + ("; a new run only" if change.starts_anew else "")
