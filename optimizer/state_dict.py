"""Optimizer state to and from a checkpoint, which does not depend on how many replicas there are.

Replica 0 writes and reads all of it. What other replicas hold comes to it and goes from it over the
control channel, as plain tensors whose shapes both sides know.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comm.collective_io import run_on_all
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.topology import Topology
from common.tensors import is_finite
from optimizer.mixed_precision import MixedPrecisionOptimizer

MASTERS = "masters"
_AT_ONCE = 2**28  # weights whose state, some 3 GB, a host keeps in memory from reading to sending


def collect_state(
    optimizer: MixedPrecisionOptimizer, control: Communicator, topology: Topology
) -> dict[str, Any]:
    """The whole state of the stage, on replica 0; other replicas get what they own alone.

    Tensors are the optimizer's own, where they are, unless another replica sent them.
    """
    state: dict[str, Any] = {"kind": optimizer.algorithm.kind, "updates": optimizer.updates}
    for name in optimizer.names:
        holders = optimizer.partition.holders(name)
        if topology.replica in holders:
            tensors = _tensors(optimizer, name)
            if 0 not in holders:
                _send(tensors, control, topology.rank_of(stage=topology.stage, replica=0))
        elif topology.replica == 0:
            tensors = like_state(optimizer, name)
            _receive(tensors, control, topology.rank_of(stage=topology.stage, replica=holders[0]))
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
    they have all its weights. Every process of the run calls it, and waits for the slowest disk.

    ValueError names the file that a state is from, and what in it is missing, extra, misshapen, not
    finite, or of another algorithm or number of updates.
    """
    optimizer.updates = updates
    for one in states or ():
        one.check(kind=optimizer.algorithm.kind, updates=updates)
    holding = {name: one for one in states or () for name in one.taken}
    for names in _batches(optimizer, control):
        kept: dict[str, dict[str, Tensor]] = {}
        read = None if states is None else partial(_read, optimizer, names, holding, topology, kept)
        run_on_all(control, read, "reading the optimizer's state", expected=())
        for name in names:
            _share(optimizer, name, kept.get(name), control, topology)
    optimizer.refresh_weights()


def _read(
    optimizer: MixedPrecisionOptimizer,
    names: Sequence[str],
    holding: Mapping[str, KeptState],
    topology: Topology,
    kept: dict[str, dict[str, Tensor]],
) -> None:
    """On replica 0: fills what it holds of `names`; `kept` gets what others are to have."""
    for name in names:
        found = holding[name].take(name, like_state(optimizer, name))
        holders = optimizer.partition.holders(name)
        if 0 in holders:
            _fill(_tensors(optimizer, name), found)
        if holders != [0]:
            kept[name] = found


def _share(
    optimizer: MixedPrecisionOptimizer,
    name: str,
    kept: Mapping[str, Tensor] | None,
    control: Communicator,
    topology: Topology,
) -> None:
    """From replica 0, which has `kept`, to the others that hold the weight."""
    others = [replica for replica in optimizer.partition.holders(name) if replica != 0]
    if topology.replica in others:
        received = like_state(optimizer, name)
        _receive(received, control, topology.rank_of(stage=topology.stage, replica=0))
        _fill(_tensors(optimizer, name), received)
    elif kept is not None:
        for replica in others:
            _send(kept, control, topology.rank_of(stage=topology.stage, replica=replica))


def _batches(optimizer: MixedPrecisionOptimizer, control: Communicator) -> list[list[str]]:
    """The weights, in their order: those of a batch are read before they are shared, which takes
    no memory but the system's for files, as they are mapped. Every process gets as many batches.
    """
    sent = {
        name: optimizer.shape_of(name).numel() * (optimizer.partition.holders(name) != [0])
        for name in optimizer.names
    }
    batches: list[list[str]] = [[]]
    size, most = 0, max(_AT_ONCE, *sent.values())
    for name in optimizer.names:
        if size + sent[name] > most:
            batches.append([])
            size = 0
        batches[-1].append(name)
        size += sent[name]
    missing = max(gather_json(control, len(batches))) - len(batches)
    return batches + [[] for _ in range(missing)]


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


HEAD = ("kind", "updates")  # what a state holds beside its parts, which are dicts by weight


@dataclass(frozen=True)
class KeptState:
    """What one stage of a checkpoint kept in the file `source`.

    names: of all weights that the stage had.
    taken: what it called those that are taken from it, by what this run calls them.
    """

    source: Path
    state: Mapping[str, Any]
    names: Collection[str]
    taken: Mapping[str, str]

    def check(self, *, kind: str, updates: int) -> None:
        """As `check_head`."""
        check_head(self.source, self.state, kind=kind, updates=updates, names=self.names)

    def take(self, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `take_weight`, of a weight of `taken`."""
        return take_weight(self.source, self.state, self.taken[name], like)


def check_head(
    source: Path, state: Mapping[str, Any], *, kind: str, updates: int, names: Collection[str]
) -> None:
    """ValueError for another algorithm or number of updates, or a weight that is not of `names`."""
    for key, expected in (("kind", kind), ("updates", updates)):
        if state.get(key) != expected:
            raise ValueError(f"{source}: {key} is {state.get(key)!r}, expected {expected!r}")
    for part, found in _parts(state).items():
        if not isinstance(found, Mapping):
            raise ValueError(f"{source}: {part} is {type(found).__name__}, expected a dict")
        if extra := sorted(map(str, found.keys() - set(names))):
            raise ValueError(f"{source}: {part}: {extra[0]} unexpected: no weight of this stage's")


def take_weight(
    source: Path, state: Mapping[str, Any], name: str, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a checked state keeps of one weight; ValueError where it is not as `like`, by part."""
    for part, of in _parts(state).items():
        if name in of and part not in like:
            raise ValueError(f"{source}: {part}: {name} unexpected, expected {', '.join(like)}")
    kept = {part: state.get(part, {}).get(name) for part in like}
    for part, found in kept.items():
        _check(f"{source}: {part}: {name}", found, like[part])
    return kept


def _check(where: str, found: object, like: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise ValueError(f"{where} is {'missing' if found is None else type(found).__name__}")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(
            f"{where} is {tuple(found.shape)} {found.dtype}, expected {tuple(like.shape)} "
            f"{like.dtype}"
        )
    if not is_finite(found):
        raise ValueError(f"{where} holds a value that is not finite (NaN or infinite)")


def _parts(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in HEAD}
