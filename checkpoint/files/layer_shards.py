"""Layer shards: a folder with one file for each module of a model, and an optional manifest.json.

Shards that an older system wrote, such as those published for download, have no manifest. They are
loaded without verification. A user who changes a shard must remove the manifest, because it lists
the checksum of the old shard.
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
_REMEDY = f"remove {NAME} to load the folder without verification"


def write_shard_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Writes the manifest of a folder; `sums` are the checksums by file name."""
    (folder / NAME).write_bytes(checksums.seal({"files": checksums.encode_sums(sums)}))


def has_manifest(folder: Path) -> bool:
    """Returns whether a folder of shards has a manifest that lists its files."""
    return (folder / NAME).exists()


def check_shard(path: Path) -> None:
    """Reads a shard or config.json, and compares its checksum with the folder's manifest.

    In a folder without a manifest the function does nothing.

    Raises:
        ValueError: the file is missing, damaged, or not listed in the manifest; the text names it.
    """
    _check_listed(path, check_file)


def check_shard_size(path: Path) -> None:
    """Checks only the size of a shard, not the content; raises ValueError as `check_shard` does."""
    _check_listed(path, check_size)


def check_companions(folder: Path) -> None:
    """Checks the tokenizer files and generation settings in the same way as `check_shard`."""
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
        raise ValueError(f"{path}: {NAME} does not list this file; {_REMEDY}")
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
    """Returns the file name of the shard of module `index`.

    Module 0 is the embedding. Module 1 is the first block, in the file `pytorch_0.pt`.
    """
    if index == 0:
        return "pytorch_embs.pt"
    return "pytorch_lm_head.pt" if index == num_layers + 1 else f"pytorch_{index - 1}.pt"


def load_layer_shard(folder: Path, family: Family, config: Any, index: int) -> dict[str, Tensor]:
    """Returns the weights of module `index` from its shard in `folder`, each in its stored type.

    The family's buffers (masks, rotary tables) are ignored.

    Raises:
        ValueError: the file is missing, is damaged, or contains code; a key is missing or extra; a
            weight's shape does not match the config; its type is not a float; or one of its values
            is not finite. The text names the file.
    """
    file = TorchFile(folder / shard_name(index, config.num_hidden_layers))
    shapes = module_shapes(family, config, index)
    check_entries(file, family, shapes)
    return read_weights(file, shapes)
