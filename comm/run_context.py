"""What every part of a run needs to know about its process."""

from dataclasses import dataclass

import torch

from comm.communicator import Communicator
from comm.process_groups import ProcessGroups
from comm.topology import Topology


@dataclass(frozen=True)
class RunContext:
    """The place of this process in the run, its communicators and its device.

    `start` names this start of the run: it is the same on all ranks, and no other start has it.
    """

    topology: Topology
    groups: ProcessGroups
    device: torch.device
    start: str

    @property
    def control(self) -> Communicator:
        """The group of all ranks, for small objects and sums on the host."""
        return self.groups.control

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"
