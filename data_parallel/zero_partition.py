"""The replicas that update each weight of a stage: all replicas, or one (ZeRO stage 1).

ZeRO is from Rajbhandari et al., arXiv 1910.02054.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from comm.communicator import Communicator


class ZeroPartition:
    """The assignment of each weight to the replicas that hold its master and moments and update it.

    Frozen weights are not part of the partition.

    Args:
        parameters: the weights of a stage by name.
        replicas: the processes that train this stage.
        sharded: whether only one replica updates each weight; if False, every replica updates
            every weight.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], replicas: Communicator, *, sharded: bool
    ) -> None:
        sizes = {name: p.numel() for name, p in parameters.items() if p.requires_grad}
        self.names = list(sizes)
        self.num_elements = sum(sizes.values())
        self.sharded, self._replicas = sharded, replicas
        owners = assign_owners(list(sizes.values()), replicas.size if sharded else 1)
        self._owners = dict(zip(self.names, owners, strict=True))

    @property
    def owned(self) -> list[str]:
        """Returns the names of the weights that this process updates."""
        return [name for name in self.names if self._replicas.rank in self.holders(name)]

    def owner(self, name: str) -> int:
        """Returns the owner of a weight: the replica that updates it, or replica 0 if all do."""
        return self._owners[name]

    def holders(self, name: str) -> list[int]:
        """Returns all replicas that update a weight."""
        return [self._owners[name]] if self.sharded else list(range(self._replicas.size))


def assign_owners(sizes: Sequence[int], num_owners: int) -> list[int]:
    """Returns the owner of each weight; all owners get about the same number of elements.

    The weights are assigned from the largest to the smallest, each to the owner with the fewest
    elements so far. All processes get the same result.
    """
    totals, owners = [0] * num_owners, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = totals.index(min(totals))
        owners[index] = owner
        totals[owner] += sizes[index]
    return owners
