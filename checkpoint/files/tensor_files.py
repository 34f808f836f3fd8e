"""Files of named tensors, from torch.save or safetensors, read one tensor at a time.

The pages read from a memory-mapped file count as memory of the process until the file is unmapped.
So a file is unmapped and mapped again after every few tensors. In this way the memory does not grow
with the number of tensors.
"""

import logging
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.text import format_bytes

LOGGER = logging.getLogger(__name__)

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_SAFETENSORS_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# The bytes that are read from a state dict before it is reopened. Reopening costs 0.1 ms per key.
MAPPED_BYTES = 64_000_000
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's shape and type, from the file's header; `dtype` is a name such as "float16"."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self) -> int:
        """Returns the number of elements."""
        return math.prod(self.shape)


class TensorFile(Protocol):
    """A file of named tensors; `entries` holds their shapes and types by key."""

    path: Path
    entries: dict[str, TensorInfo]

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yields, for each key in `keys`, the key and a copy of its tensor in memory."""


class SafetensorsFile:
    """A .safetensors file; if it is missing or damaged, a ValueError with its path is raised."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, TensorInfo] = {}
        require_file(path)
        try:
            with safe_open(path, "pt") as file:
                views = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                for key, view in views.items():
                    dtype = _SAFETENSORS_NAMES.get(view.get_dtype(), view.get_dtype())
                    self.entries[key] = TensorInfo(tuple(view.get_shape()), dtype)
        except SafetensorError as error:
            raise _damaged(path, "safetensors file", error) from error

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            with safe_open(self.path, "pt") as file:
                yield key, file.get_tensor(key).clone()


class TorchFile:
    """A state dict saved by torch.save, read without running any code from the file.

    A file in the old format (before torch 1.6) cannot be memory-mapped. It is loaded completely,
    and a warning is logged.

    Raises:
        ValueError: the file is missing or damaged, contains code, or holds other objects than dense
            tensors. The text names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        require_file(path)
        with path.open("rb") as file:
            self._mapped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
        if not self._mapped:
            LOGGER.warning(
                "%s: torch's old format cannot be memory-mapped: loading the complete file, %s",
                path,
                format_bytes(path.stat().st_size),
            )
        tensors = self._load()
        self._loaded = {} if self._mapped else tensors
        self.entries = {
            key: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for key, tensor in tensors.items()
        }

    def read(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        state, touched = self._loaded, 0
        for key in keys:
            if self._mapped and (not state or touched > MAPPED_BYTES):
                state, touched = self._load(), 0
            touched += state[key].nbytes
            yield key, state[key].detach().clone(memory_format=torch.contiguous_format)

    def _load(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns about other pickle protocols
                loaded = torch.load(
                    self.path, map_location="cpu", mmap=self._mapped, weights_only=True
                )
        except Exception as error:  # a damaged pickle can raise any error
            raise _damaged(self.path, "state dict saved by torch.save", error) from error
        return _state_dict(self.path, loaded)


def open_tensor_file(path: Path) -> TensorFile:
    """Opens a SafetensorsFile if the file's name ends in .safetensors, otherwise a TorchFile."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def require_file(path: Path) -> None:
    """Raises ValueError if the file does not exist."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")


def _state_dict(path: Path, loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds {type(loaded).__name__}, expected a dict of tensors")
    for key, value in loaded.items():
        if not isinstance(key, str):
            raise ValueError(f"{path}: key {key!r} is {type(key).__name__}, expected a string")
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{path}: {key} is {type(value).__name__}, expected a dense tensor")
    return loaded


def _damaged(path: Path, expected: str, error: Exception) -> ValueError:
    """Returns the ValueError to raise after torch or safetensors failed to load the file `path`.

    `expected` says what the file should be, and `error` is the library's error. The text of the
    ValueError is one line and omits torch's advice to load the file without safety checks.
    """
    if code := re.search(r"GLOBAL (\S+)", str(error)):
        return ValueError(f"{path}: refused: it asks to run {code[1]}, expected only tensors")
    if refused := re.search(r"WeightsUnpickler error: (.*)", str(error)):
        return ValueError(f"{path}: refused: not a pickle of only tensors: {refused[1][:160]}")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
    size = path.stat().st_size
    return ValueError(f"{path}: its {size} bytes are not a complete {expected}: {reason}")
