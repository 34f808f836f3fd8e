"""Layer shards, one file for each module of a model, and the optional manifest.json of the folder.

Published shards have no manifest and load unverified. A user who changes a file removes it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.files import checksums
from checkpoint.files.checksums import FileSum, check_file, check_size
from checkpoint.files.tensor_files import TorchFile
from checkpoint.files.validation import check_entries, module_shapes, read_weights
from modules.families.base import Family

NAME = "manifest.json"
_REMEDY = f"remove {NAME} to load the folder unverified"


def write_shard_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Writes the manifest of a folder whose files have these checksums, by name."""
    (folder / NAME).write_bytes(checksums.seal({"files": checksums.encode_sums(sums)}))


def has_manifest(folder: Path) -> bool:
    """Whether a folder of shards has a manifest to verify its files."""
    return (folder / NAME).exists()


def check_shard(path: Path) -> None:
    """Reads all of a shard or config.json; ValueError names it if it is damaged or not listed.

    Nothing is checked in a folder without a manifest.
    """
    _check_listed(path, check_file)


def check_shard_size(path: Path) -> None:
    """Checks the size alone, as `check_shard`, without reading the file."""
    _check_listed(path, check_size)


def check_companions(folder: Path) -> None:
    """Checks the listed tokenizer files and generation settings, as `check_shard`."""
    if not has_manifest(folder):
        return
    for name, expected in sorted(_read(folder).items()):
        if not name.startswith("pytorch_") and name != "config.json":
            _check(folder / name, expected, check_file)


def _check_listed(path: Path, check: Callable[..., None]) -> None:
    if not has_manifest(path.parent):
        return
    sums = _read(path.parent)
    if path.name not in sums:
        raise ValueError(f"{path}: not one of the files that {NAME} lists; {_REMEDY}")
    _check(path, sums[path.name], check)


def _read(folder: Path) -> dict[str, FileSum]:
    try:
        return checksums.decode_sums(checksums.unseal(folder / NAME))
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from error


def _check(path: Path, expected: FileSum, check: Callable[..., None]) -> None:
    try:
        check(path, expected, manifest=NAME)
    except ValueError as error:
        raise ValueError(f"{error}; convert the model again, or {_REMEDY}") from error


def shard_name(index: int, num_layers: int) -> str:
    """Returns the file name of module `index`; names number the blocks from 0."""
    if index == 0:
        return "pytorch_embs.pt"
    return "pytorch_lm_head.pt" if index == num_layers + 1 else f"pytorch_{index - 1}.pt"


def load_layer_shard(folder: Path, family: Family, config: Any, index: int) -> dict[str, Tensor]:
    """Reads the weights of module `index` from its shard in `folder`, in the types of the file.

    The family's buffers (masks, rotary tables) are ignored.

    Raises:
        ValueError: names the file: it is missing, damaged or unsafe, a key is missing or extra, or
            a weight has another shape than the config's, a type that is not a float, or a value
            that is not finite.
    """
    file = TorchFile(folder / shard_name(index, config.num_hidden_layers))
    shapes = module_shapes(family, config, index)
    check_entries(file, family, shapes)
    return read_weights(file, shapes)
