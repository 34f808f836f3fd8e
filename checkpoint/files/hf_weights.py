"""Weights in the Hugging Face format: reading from one or more files, writing to safetensors.

A shard key is the name of a weight in a layer shard. Module 0 of a model is the embedding, modules
1 to L are the L blocks, and module L + 1 is the head.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.files.tensor_files import DTYPES, TensorFile, open_tensor_file
from checkpoint.files.validation import check_entry, module_shapes, read_weights
from common.files import read_json_object, write_json
from common.text import format_bytes
from modules.families.base import Family

LOGGER = logging.getLogger(__name__)

SHARD_BYTES = 256_000_000
# In the order in which transformers looks for them.
_LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class HfWeights:
    """One weight on disk: the file that contains the weight, and the weight's key in this file."""

    file: TensorFile
    key: str

    def num_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Returns how many bytes the weight takes as `dtype`; None stands for its type on disk."""
        entry = self.file.entries[self.key]
        return entry.size * (dtype or DTYPES[entry.dtype]).itemsize


ModuleWeights = dict[str, HfWeights]  # by shard key


def read_module(module: ModuleWeights, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Returns a module's weights by shard key, cast to `dtype` if `dtype` is given.

    Raises ValueError if a weight is not finite.
    """
    weights: dict[str, Tensor] = {}
    for file in dict.fromkeys(source.file for source in module.values()):
        names = {source.key: key for key, source in module.items() if source.file is file}
        read = read_weights(file, names, dtype)
        weights |= {names[stored]: tensor for stored, tensor in read.items()}
    return weights


def hf_names(family: Family, config: Any, index: int) -> dict[str, str]:
    """Returns the Hugging Face key of each weight of module `index`, by shard key."""
    if index == 0:
        table = family.hf_embedding
    else:
        table = family.hf_block if index <= config.num_hidden_layers else family.hf_head
    shapes = module_shapes(family, config, index)
    return {key: table[key].format(layer=index - 1) for key in shapes}


def open_model(folder: Path, family: Family, config: Any) -> list[ModuleWeights]:
    """Finds each weight in the files; returns one dict per module, from shard keys to HfWeights.

    The function reads only the headers of the files. But if a weight is in the files under two
    keys, the function also reads and compares the two tensors.

    Raises:
        ValueError: a file is missing or damaged, a key is missing or extra, two keys of one weight
            have different values, a shape does not match the config, or a type is not a float. The
            text names the file or folder, and also the key if one weight is wrong.
    """
    sources = _collect(_open_files(folder), family)
    modules: list[ModuleWeights] = []
    for index in range(config.num_hidden_layers + 2):
        modules.append({})
        names = hf_names(family, config, index)
        for key, shape in module_shapes(family, config, index).items():
            if names[key] not in sources:
                aliases = [a for a, name in family.hf_aliases.items() if name == names[key]]
                spelled = " or ".join((names[key], *aliases))
                raise ValueError(f"{folder}: key {spelled} is missing from the weights")
            modules[-1][key] = source = sources.pop(names[key])
            check_entry(source.file, source.key, shape)
    if sources:
        extra = next(iter(sources.values()))
        raise ValueError(
            f"{extra.file.path}: key {extra.key} is unexpected: the model has no such weight"
        )
    return modules


def _collect(files: Sequence[TensorFile], family: Family) -> dict[str, HfWeights]:
    """Returns a dict from Hugging Face keys to the weights in the files; omits buffers.

    If a key in a file is an alias in `family.hf_aliases`, the dict has the key that the alias
    stands for. Raises ValueError if a weight has two keys with different values.
    """
    sources: dict[str, HfWeights] = {}
    for file in files:
        for key in file.entries:
            if family.buffers.search(key):
                continue
            name = family.hf_aliases.get(key, key)
            source = HfWeights(file, key)
            if name in sources and not _same(sources[name], source):
                raise ValueError(
                    f"{file.path}: {key} differs from {sources[name].key} in "
                    f"{sources[name].file.path.name}, but both keys belong to the same weight"
                )
            sources.setdefault(name, source)
    return sources


def _same(one: HfWeights, other: HfWeights) -> bool:
    return torch.equal(read_module({"": one})[""], read_module({"": other})[""])


def _open_files(folder: Path) -> list[TensorFile]:
    path = next((folder / name for name in _LAYOUTS if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"{folder}: no weights found, expected one of {', '.join(_LAYOUTS)}")
    if path.suffix != ".json":
        return [open_tensor_file(path)]
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: weight_map is {weight_map!r:.40}, expected a file for each key")
    files: dict[str, TensorFile] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file, but {path.name} names it")
        files[name] = open_tensor_file(folder / name)
    for key, name in weight_map.items():
        if key not in files[name].entries:
            raise ValueError(f"{folder / name}: key {key} is missing, but {path.name} lists it")
    return list(files.values())


def group_modules(sizes: Sequence[int]) -> list[list[int]]:
    """Groups modules into output files of at most SHARD_BYTES; a larger module has its own file.

    `sizes` holds the size of each module in bytes. Returns the indices of the modules of each file.
    """
    groups: list[list[int]] = []
    filled = SHARD_BYTES
    for index, size in enumerate(sizes):
        if filled + size > SHARD_BYTES or not groups:
            groups.append([])
            filled = 0
        groups[-1].append(index)
        filled += size
    return groups


def write_model(
    folder: Path, sizes: Sequence[int], read: Callable[[int], Mapping[str, Tensor]]
) -> None:
    """Writes a model as safetensors files; the memory holds the tensors of one file at a time.

    `sizes` holds the size of each module in bytes. `read` returns the tensors of the module with a
    given index, by Hugging Face key.
    """
    groups = group_modules(sizes)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        name = "model.safetensors" if len(groups) == 1 else name
        tensors = {key: tensor for index in group for key, tensor in read(index).items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        del tensors  # before the tensors of the next file are read
        written = sum(sizes[: group[-1] + 1])
        LOGGER.info(
            "%s is written: %s of %s", name, format_bytes(written), format_bytes(sum(sizes))
        )
    if len(groups) > 1:
        index_file = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index_file)
