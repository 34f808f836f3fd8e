"""Optimizer state for a checkpoint, independent of the number of replicas.

Replica 0 writes and reads the state of a stage. Other replicas send and receive the state of the
weights that they update. The receiver knows the shapes, so the sender sends only the values.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from comm.collective_io import run_on_all
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.topology import Topology
from common.tensors import is_finite
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.saved_state import SavedState

MASTERS = "masters"
# The largest number of elements in a batch of weights. A host keeps the state of a batch (about
# 3 GB) in memory from reading to sending.
_BATCH_ELEMENTS = 2**28


def collect_state(
    optimizer: MixedPrecisionOptimizer, control: Communicator, topology: Topology
) -> dict[str, Any]:
    """Returns the optimizer state of the stage; every replica of the stage must call it.

    Replica 0 gets the complete state. Any other replica gets the state of the weights that it
    updates. The tensors are the optimizer's own tensors on its device; on replica 0, tensors that
    another replica sent are in host memory.
    """
    state: dict[str, Any] = {"kind": optimizer.algorithm.kind, "updates": optimizer.updates}
    for name in optimizer.names:
        holders = optimizer.partition.holders(name)
        if topology.replica in holders:
            tensors = _tensors(optimizer, name)
            if 0 not in holders:
                _send(tensors, control, topology.rank_of(stage=topology.stage, replica=0))
        elif topology.replica == 0:
            tensors = empty_state(optimizer, name)
            _receive(tensors, control, topology.rank_of(stage=topology.stage, replica=holders[0]))
        else:
            continue
        for part, tensor in tensors.items():
            state.setdefault(part, {})[name] = tensor
    return state


def restore_state(
    optimizer: MixedPrecisionOptimizer,
    states: Sequence[SavedState] | None,
    control: Communicator,
    topology: Topology,
    *,
    updates: int,
) -> None:
    """Fills the optimizer from the states in a checkpoint, which `collect_state` made for the save.

    Every process of the run must call it, and waits for the slowest disk.

    Args:
        optimizer: the optimizer to fill.
        states: on replica 0, the states of the saved stages that together have all weights of this
            stage; None on other replicas.
        control: the group of all processes.
        topology: the stage and replica of this process.
        updates: the number of updates before the save; each state must have this number.

    Raises:
        ValueError: a state does not match the optimizer; the text names the file and the part.
    """
    optimizer.updates = updates
    for state in states or ():
        state.check(kind=optimizer.algorithm.kind, updates=updates)
    sources = {name: state for state in states or () for name in state.saved_names}
    for names in _batches(optimizer, control):
        to_send: dict[str, dict[str, Tensor]] = {}
        read = None
        if states is not None:
            read = partial(_read, optimizer, names, sources, to_send)
        run_on_all(control, read, "reading the optimizer's state", expected=())
        for name in names:
            _share(optimizer, name, to_send.get(name), control, topology)
    optimizer.refresh_weights()


def _read(
    optimizer: MixedPrecisionOptimizer,
    names: Sequence[str],
    sources: Mapping[str, SavedState],
    to_send: dict[str, dict[str, Tensor]],
) -> None:
    """Reads the state of the weights `names` on replica 0.

    If replica 0 updates a weight, the function copies the state of this weight to `optimizer`. If
    other replicas update a weight, the function adds the state of this weight to `to_send`.
    """
    for name in names:
        values = sources[name].read(name, empty_state(optimizer, name))
        holders = optimizer.partition.holders(name)
        if 0 in holders:
            _fill(_tensors(optimizer, name), values)
        if holders != [0]:
            to_send[name] = values


def _share(
    optimizer: MixedPrecisionOptimizer,
    name: str,
    values: Mapping[str, Tensor] | None,
    control: Communicator,
    topology: Topology,
) -> None:
    """Sends a weight's state from replica 0 to the other replicas that update the weight.

    `values` is the state on replica 0. It is None on other replicas, and also on replica 0 if no
    other replica needs the state.
    """
    others = [replica for replica in optimizer.partition.holders(name) if replica != 0]
    if topology.replica in others:
        received = empty_state(optimizer, name)
        _receive(received, control, topology.rank_of(stage=topology.stage, replica=0))
        _fill(_tensors(optimizer, name), received)
    elif values is not None:
        for replica in others:
            _send(values, control, topology.rank_of(stage=topology.stage, replica=replica))


def _batches(optimizer: MixedPrecisionOptimizer, control: Communicator) -> list[list[str]]:
    """Returns the names of the weights in batches; every process has the same number of batches.

    Replica 0 reads the state of one batch and sends it before it reads the next batch, so only one
    batch needs memory at a time. The files are memory-mapped, so this memory is part of the
    system's file cache.
    """
    sent = {
        name: optimizer.weight_of(name).numel() * (optimizer.partition.holders(name) != [0])
        for name in optimizer.names
    }
    batches: list[list[str]] = [[]]
    size, limit = 0, max(_BATCH_ELEMENTS, *sent.values())
    for name in optimizer.names:
        if size + sent[name] > limit:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += sent[name]
    missing = max(gather_json(control, len(batches))) - len(batches)
    return batches + [[] for _ in range(missing)]


def finite_weights(optimizer: MixedPrecisionOptimizer) -> list[bool]:
    """Returns for each weight whether the weight and its state on this process are finite."""
    return [
        all(map(is_finite, (optimizer.weight_of(name), *_tensors(optimizer, name).values())))
        for name in optimizer.names
    ]


def _tensors(optimizer: MixedPrecisionOptimizer, name: str) -> dict[str, Tensor]:
    """Returns a weight's moments and, in half precision, its master, if this process has them."""
    tensors = dict(optimizer.moments.get(name, {}))
    if optimizer.has_own_masters and name in optimizer.masters:
        tensors[MASTERS] = optimizer.masters[name]
    return tensors


def empty_state(optimizer: MixedPrecisionOptimizer, name: str) -> dict[str, Tensor]:
    """Returns new host tensors like a weight's moments and, in half precision, like its master."""
    master = torch.empty(optimizer.weight_of(name).shape, dtype=torch.float32)
    tensors = dict(optimizer.algorithm.empty_state(master))
    if optimizer.has_own_masters:
        tensors[MASTERS] = master
    return tensors


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
