"""Validation of weights: a module has exactly those that its config defines, all finite.

An error is one line that names file and key, and shows the actual value and the expected one.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.files.tensor_files import DTYPES, TensorFile
from common.tensors import is_finite
from modules.build import make_layer
from modules.families.base import Family

# The types that training computes in, and the remedy for weights that do not fit.
_FITTING = {
    torch.float32: ("fp32", ""),
    torch.float16: ("fp16", ": use --bf16"),
    torch.bfloat16: ("bf16", ": train in fp32"),
}


def module_shapes(family: Family, config: Any, index: int) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the weights of module `index`, as `modules.build` counts."""
    state = make_layer(family, config, index, "meta").state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def check_entries(file: TensorFile, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless a file has floats of these shapes alone, beside buffers."""
    path, keys = file.path, {key for key in file.entries if not family.buffers.search(key)}
    if missing := sorted(shapes.keys() - keys):
        raise ValueError(f"{path}: key {_summarise(missing)} missing, expected {len(shapes)} keys")
    if extra := sorted(keys - shapes.keys()):
        raise ValueError(f"{path}: key {_summarise(extra)} unexpected: no weight of this model")
    for key, shape in shapes.items():
        check_entry(file, key, shape)


def check_entry(file: TensorFile, key: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for another shape, or for a type that is not a float."""
    path, entry = file.path, file.entries[key]
    if entry.shape != shape:
        raise ValueError(f"{path}: {key} has shape {entry.shape}, config.json makes it {shape}")
    if entry.dtype not in DTYPES:
        raise ValueError(f"{path}: {key} is {entry.dtype}, expected one of {', '.join(DTYPES)}")


def read_weights(
    file: TensorFile, keys: Iterable[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Reads tensors of a file, cast to `dtype` if given.

    ValueError names file and key of a tensor that is not finite, or would not be as `dtype`.
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
    """Raises ValueError for a finite weight that is infinite in fp32, or then in `dtype`."""
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


def _summarise(keys: list[str]) -> str:
    """Returns `a`, or `a and 3 more`: an error stays one readable line."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
