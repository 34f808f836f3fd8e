"""What a rank's machine has for a run, as far as it shows without torch and the other ranks."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from typing import TextIO

from arguments.checks import check_model, check_optimizer, doubts
from checkpoint.lock import lock_folder, make_folder
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import Interface, choose_interface, export
from tasks.evaluation_sets import check_evaluation_data
from tasks.registry import check_source

logger = logging.getLogger(__name__)


@dataclass
class LocalResources:
    """What this machine has for the run; `problem` is the first thing that it lacks."""

    problem: ValueError | None = None
    interface: Interface | None = None
    lock: TextIO | None = None


def check_this_machine(args: argparse.Namespace) -> LocalResources:
    """Checks what can be checked without torch and the other ranks.

    What this rank alone can see is kept: it joins, reports it, and all end.
    """
    machine = LocalResources()
    for doubt in doubts(args) if args.rank == 0 else []:
        logger.warning("%s", doubt)
    try:
        if args.world_size > 1 or args.net_interface is not None:
            machine.interface = _interface(args, args.net_interface)
        if args.check_cluster:
            return machine  # what else is wrong is told with all that differs
        check_model(args)
        check_optimizer(args)
        if args.rank < args.pipeline_group_size:  # replica 0 writes the checkpoints
            make_folder(args.checkpoint_path)
        if args.rank == 0:
            _check_data(args)
            machine.lock = lock_folder(args.checkpoint_path)
    except ValueError as error:
        machine.problem = error
    return machine


def _interface(args: argparse.Namespace, flag: str | None) -> Interface:
    host, _ = parse_dist_url(args.dist_url)
    interface = choose_interface(flag=flag, master_host=host, environ=os.environ)
    export(interface, os.environ)
    return interface


def _check_data(args: argparse.Namespace) -> None:
    for spec in args.sources:
        check_source(spec)
    if args.evaluation_data is not None:
        check_evaluation_data(args.evaluation_data)
