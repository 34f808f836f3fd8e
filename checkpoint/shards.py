"""Layer shards: a model as one file per module, which each rank of a run reads its own part of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.files.tensor_files import TorchFile
from checkpoint.files.validation import check_entry, check_keys, module_shapes, read_weights
from modules.families.base import Family


def shard_name(index: int, num_layers: int) -> str:
    """The file of module `index` of a model of `num_layers` blocks (`modules.build`).

    Blocks are numbered from 0 in file names: block i is module i + 1.
    """
    if index == 0:
        return "pytorch_embs.pt"
    return "pytorch_lm_head.pt" if index == num_layers + 1 else f"pytorch_{index - 1}.pt"


def load_layer_shard(folder: Path, family: Family, config: Any, index: int) -> dict[str, Tensor]:
    """The weights of module `index` from its shard in `folder`, in the types they are saved in.

    The family's buffers (masks, rotary tables) are ignored. Raises ValueError, one line that names
    the file, for a missing, damaged or unsafe file, a missing or extra key, another shape than the
    config's, a type that is no float's, and a weight that is not finite.
    """
    file = TorchFile(folder / shard_name(index, config.num_hidden_layers))
    shapes = module_shapes(family, config, index)
    check_keys(file.path, (key for key in file.entries if not family.buffers.search(key)), shapes)
    for key, shape in shapes.items():
        check_entry(file.path, key, file.entries[key], shape)
    return read_weights(file, shapes)
