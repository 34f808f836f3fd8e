"""The context of a run: topology, process groups and device of this process."""

from dataclasses import dataclass

import torch

from comm.communicator import Communicator
from comm.process_groups import ProcessGroups
from comm.topology import Topology


@dataclass(frozen=True)
class RunContext:
    """The topology, the communicators and the device of this process.

    `start` is a text that identifies this start of the program: it is the same on all ranks, and
    it is different at every other start.
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
