"""Training of a single rank in the test's own process."""

from pathlib import Path
from typing import Any

import torch

from comm.backends.single_process import SingleProcessCommunicator
from comm.process_groups import ProcessGroups
from comm.run_context import RunContext
from comm.topology import Topology
from tests.support.cases import settings_of, train_with


def run_parts(flags: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `open_run` for a process without peers."""
    settings = settings_of(flags)
    alone = SingleProcessCommunicator()
    parallel = settings.parallel
    topology = Topology(parallel.rank, parallel.pipeline_group_size, parallel.data_group_size)
    context = RunContext(topology, ProcessGroups(alone, alone, alone), torch.device("cpu"), "0123")
    return {"settings": settings, "context": context}


def train_alone(flags: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    Path(flags["checkpoint-path"]).mkdir(exist_ok=True)
    train_with(**run_parts(flags))
