"""Optimizer state to and from a checkpoint, independent of the number of replicas.

Replica 0 writes and reads the state of a stage. The parts that other replicas hold travel over the
control group, as tensors whose shapes both sides know.
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
# Elements of the weights whose state, some 3 GB, a host keeps in memory from reading to sending.
_BATCH_ELEMENTS = 2**28


def collect_state(
    optimizer: MixedPrecisionOptimizer, control: Communicator, topology: Topology
) -> dict[str, Any]:
    """Returns the state of the stage on replica 0; other replicas get the part that they hold.

    Tensors are the optimizer's own, on its device, unless another replica sent them.
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
    """Fills the optimizer from the states that `collect_state` returned.

    Every process of the run calls it, and waits for the slowest disk.

    Args:
        optimizer: is filled.
        states: on replica 0, states that together have all its weights; None on other replicas.
        control: the group of all processes.
        topology: the place of this process.
        updates: the number of updates that the states must have.

    Raises:
        ValueError: a state is not of this optimizer; the text names its file and the part.
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
    """Fills replica 0's part of the weights `names`; `to_send` gets that of other replicas."""
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
    """Sends `values` from replica 0, where they were read, to the others that hold the weight."""
    others = [replica for replica in optimizer.partition.holders(name) if replica != 0]
    if topology.replica in others:
        received = empty_state(optimizer, name)
        _receive(received, control, topology.rank_of(stage=topology.stage, replica=0))
        _fill(_tensors(optimizer, name), received)
    elif values is not None:
        for replica in others:
            _send(values, control, topology.rank_of(stage=topology.stage, replica=replica))


def _batches(optimizer: MixedPrecisionOptimizer, control: Communicator) -> list[list[str]]:
    """Returns the weights in batches, the same number on every process.

    A batch is read before it is sent. Its files are mapped, so that reading takes no memory but the
    system's for files.
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
    """Returns for each weight whether it is finite here, and its state with it."""
    return [
        all(map(is_finite, (optimizer.weight_of(name), *_tensors(optimizer, name).values())))
        for name in optimizer.names
    ]


def _tensors(optimizer: MixedPrecisionOptimizer, name: str) -> dict[str, Tensor]:
    """Returns the state of one weight, by part; nothing where another process steps it."""
    tensors = dict(optimizer.moments.get(name, {}))
    if optimizer.has_own_masters and name in optimizer.masters:
        tensors[MASTERS] = optimizer.masters[name]
    return tensors


def empty_state(optimizer: MixedPrecisionOptimizer, name: str) -> dict[str, Tensor]:
    """Returns host tensors with the shapes and types of one weight's state, by part."""
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
