"""The optimizer state of one stage in a checkpoint; every part is checked when it is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from common.tensors import is_finite

HEADER = ("kind", "updates")  # the other entries of a state are its parts, dicts by weight


@dataclass(frozen=True)
class SavedState:
    """The optimizer state of one stage in a checkpoint.

    source: the file of the state, for error texts.
    state: the content of the file. Its parts are the masters and each kind of moments. A part maps
        the names of the weights to tensors.
    names: the names of all weights of the saved stage.
    saved_names: for each weight to restore, maps its name in this run to its name in the file.
    """

    source: Path
    state: Mapping[str, Any]
    names: Collection[str]
    saved_names: Mapping[str, str]

    @property
    def _parts(self) -> dict[str, Any]:
        return {key: value for key, value in self.state.items() if key not in HEADER}

    def check(self, *, kind: str, updates: int) -> None:
        """Raises ValueError if algorithm or number of updates is wrong, or a weight is unknown.

        `kind` is the expected algorithm, and `updates` is the expected number of updates. A weight
        is unknown if it is not in `names`.
        """
        for key, expected in (("kind", kind), ("updates", updates)):
            if self.state.get(key) != expected:
                raise ValueError(
                    f"{self.source}: {key} is {self.state.get(key)!r}, expected {expected!r}"
                )
        for part, weights in self._parts.items():
            if not isinstance(weights, Mapping):
                raise ValueError(
                    f"{self.source}: {part} is {type(weights).__name__}, expected a dict"
                )
            if extra := sorted(map(str, weights.keys() - set(self.names))):
                raise ValueError(
                    f"{self.source}: {part}: {extra[0]} unexpected: the stage has no such weight"
                )

    def read(self, name: str, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the state of one weight, by part.

        Args:
            name: the name of the weight in this run, a key of `saved_names`.
            like: tensors with the expected shapes and types, by part.

        Raises:
            ValueError: a part is missing, unexpected, of another shape or type, or not finite.
        """
        name = self.saved_names[name]
        for part, weights in self._parts.items():
            if name in weights and part not in like:
                raise ValueError(
                    f"{self.source}: {part}: {name} unexpected, expected {', '.join(like)}"
                )
        values = {part: self.state.get(part, {}).get(name) for part in like}
        for part, value in values.items():
            _check_tensor(f"{self.source}: {part}: {name}", value, like[part])
        return values


def _check_tensor(place: str, value: object, like: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{place} is {'missing' if value is None else type(value).__name__}")
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(
            f"{place} is {tuple(value.shape)} {value.dtype}, expected {tuple(like.shape)} "
            f"{like.dtype}"
        )
    if not is_finite(value):
        raise ValueError(f"{place} holds a value that is not finite (NaN or infinite)")
