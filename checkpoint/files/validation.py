"""Checks of weights: a file must have exactly the weights that the config requires, all finite.

An error text is one line. It names the file and the key of the weight, and says what is wrong.
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
    """Returns the shape of each weight in module `index`, by name.

    Module 0 is the embedding, modules 1 to L are the L blocks, and module L + 1 is the head.
    """
    state = make_layer(family, config, index, "meta").state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def check_entries(file: TensorFile, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless a file has exactly the weights in `shapes`, with these shapes.

    The type of each weight must be a float type. The buffers (masks, rotary tables) in the file are
    ignored.
    """
    path, keys = file.path, {key for key in file.entries if not family.buffers.search(key)}
    if missing := sorted(shapes.keys() - keys):
        raise ValueError(f"{path}: missing key {_summarise(missing)}, expected {len(shapes)} keys")
    if extra := sorted(keys - shapes.keys()):
        raise ValueError(
            f"{path}: unexpected key {_summarise(extra)}: the model has no such weight"
        )
    for key, shape in shapes.items():
        check_entry(file, key, shape)


def check_entry(file: TensorFile, key: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError if a tensor's shape is not `shape`, or if its type is not a float type."""
    path, entry = file.path, file.entries[key]
    if entry.shape != shape:
        raise ValueError(f"{path}: {key} has shape {entry.shape}, config.json expects {shape}")
    if entry.dtype not in DTYPES:
        raise ValueError(f"{path}: {key} is {entry.dtype}, expected one of {', '.join(DTYPES)}")


def read_weights(
    file: TensorFile, keys: Iterable[str], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Returns the file's tensors for `keys`, by key; casts them to `dtype` if `dtype` is given.

    Raises:
        ValueError: a tensor is not finite, before or after the cast; the text names file and key.
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
            f"{path}: {key} holds {tensor.abs().max().item():g}, but the largest value of {dtype} "
            f"is {torch.finfo(dtype).max:g}: choose a wider type"
        )
    return cast


def check_fits(path: Path, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Raises ValueError if a weight is too large for fp32 or for `dtype`, the compute type."""
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
    """Returns the first key and, if there are others, their number: "wte.weight and 3 more"."""
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
