"""Optimizer state that was read from a file: whether it is this run's, strictly, and all finite.

An error is one line that names the file and what in it is not as expected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.files.validation import is_finite

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
