"""Optimizer state to and from a checkpoint, which does not depend on how many replicas there are.

Replica 0 writes and reads all of it. What other replicas hold comes to it and goes from it over the
control channel, as plain tensors whose shapes both sides know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from checkpoint.strict import is_finite
from comm.communicator import Communicator
from comm.topology import Topology
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state_check import KeptState

MASTERS = "masters"


def collect_state(
    optimizer: MixedPrecisionOptimizer, control: Communicator, topology: Topology
) -> dict[str, Any]:
    """The whole state of the stage, on replica 0; other replicas get what they own alone.

    Tensors are the optimizer's own, where they are, unless another replica sent them.
    """
    state: dict[str, Any] = {"kind": optimizer.algorithm.kind, "updates": optimizer.updates}
    for name in optimizer.names:
        holder = optimizer.owners[name] if optimizer.sharded else topology.replica
        if holder == topology.replica:
            tensors = _tensors(optimizer, name)
            if optimizer.sharded and topology.replica != 0:
                _send(tensors, control, topology.rank_of(stage=topology.stage, replica=0))
        elif topology.replica == 0:
            tensors = like_state(optimizer, name)
            _receive(tensors, control, topology.rank_of(stage=topology.stage, replica=holder))
        else:
            continue
        for part, tensor in tensors.items():
            state.setdefault(part, {})[name] = tensor
    return state


def restore_state(
    optimizer: MixedPrecisionOptimizer,
    states: Sequence[KeptState] | None,
    control: Communicator,
    topology: Topology,
    *,
    updates: int,
) -> None:
    """Fills the optimizer from `collect_state`'s results, which replica 0 alone gives: together
    they have all its weights.

    ValueError names the file that a state is from, and what in it is missing, extra, misshapen, not
    finite, or of another algorithm or number of updates.
    """
    optimizer.updates = updates
    for one in states or ():
        one.check(kind=optimizer.algorithm.kind, updates=updates)
    holding = {name: one for one in states or () for name in one.taken}
    for name in optimizer.names:
        if states is not None:
            kept = holding[name].take(name, like_state(optimizer, name))
            for replica in range(topology.num_replicas):
                holds = not optimizer.sharded or optimizer.owners[name] == replica
                if replica == 0 and holds:
                    _fill(_tensors(optimizer, name), kept)
                elif holds:
                    _send(kept, control, topology.rank_of(stage=topology.stage, replica=replica))
        elif name in optimizer.masters:
            received = like_state(optimizer, name)
            _receive(received, control, topology.rank_of(stage=topology.stage, replica=0))
            _fill(_tensors(optimizer, name), received)
    optimizer.refresh_weights()


def finite_weights(optimizer: MixedPrecisionOptimizer) -> list[bool]:
    """For each weight, whether all that a checkpoint would keep of it here is finite."""
    return [
        all(map(is_finite, (optimizer.weight_of(name), *_tensors(optimizer, name).values())))
        for name in optimizer.names
    ]


def _tensors(optimizer: MixedPrecisionOptimizer, name: str) -> dict[str, Tensor]:
    """What a checkpoint keeps of one weight; nothing where another process steps it."""
    kept = dict(optimizer.moments.get(name, {}))
    if optimizer.has_own_masters and name in optimizer.masters:
        kept[MASTERS] = optimizer.masters[name]
    return kept


def like_state(optimizer: MixedPrecisionOptimizer, name: str) -> dict[str, Tensor]:
    """Host tensors of the shapes and types of what a checkpoint keeps of one weight's state."""
    master = torch.empty(optimizer.shape_of(name), dtype=torch.float32)
    kept = dict(optimizer.algorithm.empty_state(master))
    if optimizer.has_own_masters:
        kept[MASTERS] = master
    return kept


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for part, target in targets.items():
        target.copy_(values[part])


def _send(tensors: Mapping[str, Tensor], control: Communicator, rank: int) -> None:
    for part in sorted(tensors):
        control.send(tensors[part].detach().cpu().contiguous(), to=rank).wait()


def _receive(tensors: Mapping[str, Tensor], control: Communicator, rank: int) -> None:
    for part in sorted(tensors):
        control.receive(tensors[part], source=rank).wait()
