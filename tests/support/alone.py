"""Training runs in the test's own process, a world of one."""

import io
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from arguments.train import parse_train
from comm.backends.single_process import SingleProcessCommunicator
from comm.lifecycle.stop_signals import StopRequest
from comm.process_groups import ProcessGroups
from comm.run_context import RunContext
from comm.topology import Topology
from monitor.console import Console
from tests.support.cases import to_argv
from training.run import train


def run_parts(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `open_run`, of a process that meets no other."""
    # Starting a process to tokenize takes longer than these texts do.
    settings = parse_train(to_argv({"data-workers": 0, **flags}), {})
    alone = SingleProcessCommunicator()
    parallel = settings.parallel
    topology = Topology(parallel.rank, parallel.pipeline_group_size, parallel.data_group_size)
    context = RunContext(topology, ProcessGroups(alone, alone, alone), torch.device("cpu"), "0123")
    return {"settings": settings, "context": context}


def train_alone(flags: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    Path(flags["checkpoint-path"]).mkdir(exist_ok=True)
    train_with(run_parts(flags))


def train_with(parts: dict[str, Any]) -> None:
    with ExitStack() as closing, patch("monitor.recorder.draw_loss"):
        train(**parts, console=Console(io.StringIO()), stop=StopRequest(), closing=closing)
