"""Strict reading: a module's weights are exactly those that its config calls for, all finite.

An error is one line that names file and key, and shows what was found beside what was expected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.files.tensor_files import DTYPES, Entry, TensorFile
from common.tensors import is_finite
from modules.build import make_layer
from modules.families.base import Family

# The types that training computes in, and what to do about weights that do not fit.
_FITTING = {
    torch.float32: ("fp32", ""),
    torch.float16: ("fp16", ": use --bf16"),
    torch.bfloat16: ("bf16", ": train in fp32"),
}

Shapes = Mapping[str, tuple[int, ...]]


def module_shapes(family: Family, config: Any, index: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of module `index` (`modules.build` counts them)."""
    state = make_layer(family, config, index, "meta").state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def check_keys(path: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Raises ValueError for a key that is missing or one too many."""
    found, expected = set(found), set(expected)
    if missing := sorted(expected - found):
        raise ValueError(f"{path}: key {_listed(missing)} missing, expected {len(expected)} keys")
    if extra := sorted(found - expected):
        raise ValueError(f"{path}: key {_listed(extra)} unexpected: no weight of this model's")


def check_entry(path: Path, key: str, entry: Entry, shape: tuple[int, ...]) -> None:
    """Raises ValueError for another shape, or for a type that is no float's."""
    if entry.shape != shape:
        raise ValueError(f"{path}: {key} has shape {entry.shape}, config.json makes it {shape}")
    if entry.dtype not in DTYPES:
        raise ValueError(f"{path}: {key} is {entry.dtype}, expected one of {', '.join(DTYPES)}")


def read_weights(
    file: TensorFile, keys: Iterable[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Tensors of a file, as `dtype` if given.

    Raises ValueError, naming file and key, where one is not finite, or would not be as `dtype`.
    """
    return {key: _checked(file.path, key, tensor, dtype) for key, tensor in file.read(keys)}


def _checked(path: Path, key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if not is_finite(tensor):
        raise ValueError(f"{path}: {key} holds a value that is not finite (NaN or infinite)")
    if dtype is None or dtype == tensor.dtype:
        return tensor
    cast = tensor.to(dtype)
    if not is_finite(cast):
        raise ValueError(
            f"{path}: {key} holds {tensor.abs().max().item():g}, beyond {dtype}'s largest "
            f"value {torch.finfo(dtype).max:g}: choose a wider type"
        )
    return cast


def check_fits(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError for a finite weight that is infinite in fp32, or in `dtype` after that."""
    for key, tensor in weights.items():
        low, high = tensor.aminmax()
        largest = high if high >= -low else low
        for wanted in (torch.float32, dtype):
            if not largest.float().to(wanted).isfinite():
                name, advice = _FITTING[wanted]
                raise ValueError(
                    f"{path}: {key} holds {largest.item():g}, which does not fit {name} (largest "
                    f"{torch.finfo(wanted).max:g}){advice}"
                )


def _listed(keys: list[str]) -> str:
    """`a`, or `a and 3 more`: an error stays one readable line."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
