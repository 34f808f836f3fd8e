"""What is recorded of a run, on rank 0: metrics, curve, live line, and the flags beside them."""

from __future__ import annotations

import argparse

from arguments.checks import fixed_flags, free_flags
from checkpoint.store import ResumePoint
from comm.topology import Topology
from monitor.console import Console
from monitor.recorder import Recorder, SilentRecorder, open_recorder
from pipeline_parallel.partition.split import Split


def open_run_recorder(
    args: argparse.Namespace,
    *,
    topology: Topology,
    layers: Split,
    resume: ResumePoint | None,
    console: Console,
) -> Recorder:
    """Goes on with the records of the run that `resume` is of; the other ranks record nothing."""
    if topology.rank != 0:
        return SilentRecorder()
    meta = None if resume is None else resume.meta
    return open_recorder(
        args.checkpoint_path,
        console=console,
        total_steps=args.total_steps,
        resumed_step=None if resume is None else resume.step or None,
        project=args.project_name,
        config={
            "--pipeline-group-size": args.pipeline_group_size,
            "--num-layers": str(layers),
            **fixed_flags(args),
            **free_flags(args),
        },
        run_id=None if meta is None else meta.get("wandb_id"),
    )
