"""Conversion of a model in the Hugging Face format to layer shards, one module at a time."""

import logging
import shutil
from pathlib import Path

from checkpoint.conversion.output_folder import new_folder
from checkpoint.files.checksums import FileSum, save_summed, sum_file
from checkpoint.files.hf_weights import open_model, read_module
from checkpoint.files.layer_shards import shard_name, write_shard_manifest
from checkpoint.files.model_folder import copy_companions, find_model, folder_name, write_config
from common.tensors import DTYPES
from modules.families.base import Family

LOGGER = logging.getLogger(__name__)


def convert_from_hf(family: Family, *, model_name: str, save_dir: Path, dtype: str) -> Path:
    """Writes the layer shards of a model, and a manifest that lists all written files.

    Args:
        model_name: a local folder or the name of a model on the hub.
        dtype: the type to write: "fp16", "bf16" or "fp32"; "keep" keeps the type of each weight.

    Returns:
        The folder of the shards inside `save_dir`. Its name is the base name of a local folder, or
        the hub name with / replaced by _.

    Raises:
        ValueError: a flag or a file is wrong; the text names it. No new files are left in
            `save_dir`.
    """
    final = save_dir / folder_name(model_name)
    source = find_model(model_name, flag="--model-name", weights=True)
    config = family.load_config(source)
    modules = open_model(source, family, config)
    target = None if dtype == "keep" else DTYPES[dtype]
    needed = sum(weight.num_bytes(target) for module in modules for weight in module.values())
    sums: dict[str, FileSum] = {}
    with new_folder(final, needed=needed) as folder:
        for index, module in enumerate(modules):
            name = shard_name(index, config.num_hidden_layers)
            LOGGER.info("writing %s (%d of %d)", name, index + 1, len(modules))
            sums[name] = save_summed(read_module(module, target), folder / name)
        copy_companions(source, folder)
        if target is None:
            shutil.copyfile(source / "config.json", folder / "config.json")
        else:
            write_config(source, folder, dtype=str(target).removeprefix("torch."))
        small = [path for path in folder.iterdir() if path.name not in sums]
        write_shard_manifest(folder, sums | {path.name: sum_file(path) for path in small})
    LOGGER.info("%s is complete", final)
    return final
