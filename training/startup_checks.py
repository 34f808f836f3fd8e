"""Checks of this machine before a rank joins the other ranks. The module imports no torch."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TextIO

from arguments.checks import warnings_about
from arguments.config_checks import check_model, check_optimizer
from arguments.settings import DataSettings, NetworkSettings, Settings
from checkpoint.lock import lock_folder, make_folder
from comm.rendezvous.dist_url import parse_dist_url
from comm.rendezvous.interface import Interface, choose_interface, export
from tasks.evaluation_sets import check_evaluation_data
from tasks.registry import check_source

logger = logging.getLogger(__name__)


@dataclass
class LocalResources:
    """The resources of this machine for the run.

    problem: the error of a failed check.
    gpu_variables: the environment variables that `training.gpu_environment` set.
    """

    problem: ValueError | None = None
    interface: Interface | None = None
    lock: TextIO | None = None
    gpu_variables: Mapping[str, str] = field(default_factory=dict)


def check_this_machine(settings: Settings) -> LocalResources:
    """Makes all checks of this machine that need neither torch nor the other ranks.

    A problem is returned, not raised. Only this rank sees the problem, so this rank first joins the
    other ranks and reports it; then all ranks exit.
    """
    resources, parallel = LocalResources(), settings.parallel
    for warning in warnings_about(settings) if parallel.rank == 0 else []:
        logger.warning("%s", warning)
    try:
        if parallel.world_size > 1 or settings.network.net_interface is not None:
            resources.interface = _choose_interface(settings.network)
        if settings.output.check_cluster:
            return resources  # the check reports all other problems, with those of all ranks
        check_model(settings)
        check_optimizer(settings)
        path = settings.checkpoint.checkpoint_path
        if parallel.rank < parallel.pipeline_group_size:  # replica 0 writes the checkpoints
            make_folder(path)
        if parallel.rank == 0:
            _check_data(settings.data)
            resources.lock = lock_folder(path)
    except ValueError as error:
        resources.problem = error
    return resources


def _choose_interface(network: NetworkSettings) -> Interface:
    host, _ = parse_dist_url(network.dist_url)
    interface = choose_interface(flag=network.net_interface, master_host=host, environ=os.environ)
    export(interface, os.environ)
    return interface


def _check_data(data: DataSettings) -> None:
    for source in data.sources:
        check_source(source)
    if data.evaluation_data is not None:
        check_evaluation_data(data.evaluation_data)
