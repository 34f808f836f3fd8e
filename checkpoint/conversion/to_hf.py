"""Conversion of a training checkpoint to the Hugging Face format, one layer at a time."""

import functools
import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from checkpoint.conversion.output_folder import new_folder
from checkpoint.conversion.verify import verify as verify_logits
from checkpoint.files.hf_weights import hf_names, read_module, write_model
from checkpoint.files.model_folder import copy_companions, find_model, write_config
from checkpoint.files.tensor_files import DTYPES
from checkpoint.resume.saved_split import read_split
from checkpoint.steps.manifest import check_weights
from checkpoint.steps.stage_weights import open_checkpoint, resolve_checkpoint
from modules.families.base import Family
from pipeline_parallel.partition.split import Layers

LOGGER = logging.getLogger(__name__)


def convert_to_hf(
    family: Family,
    *,
    ckpt_path: Path,
    save_path: Path,
    n_stages: int | None,
    n_layer_per_stage: Layers | None,
    config_name: str | None,
    fp16: bool,
    verify: bool,
) -> Path:
    """Converts a training checkpoint to a Hugging Face model in `save_path`; returns `save_path`.

    Args:
        ckpt_path: the folder of a step, or a folder with the file `latest`.
        n_stages, n_layer_per_stage: the split of the layers. A checkpoint of an older system (a
            predecessor, see docs/glossary.md) does not record its split, so they are required. For
            any other checkpoint they can be None; if given, they must agree with its meta.json.
        config_name: a local folder or hub name with config and tokenizer; None stands for the
            step's folder.
        fp16: whether to write fp16. Otherwise all weights get the widest type in the checkpoint.
        verify: whether to compare the logits of the written model with those of the checkpoint.

    Raises:
        ValueError: a flag or file is wrong or damaged, or the logits differ. The text names the
            flag or file. Nothing is left in `save_path`.
    """
    step = resolve_checkpoint(ckpt_path)
    if not check_weights(step, companions=config_name is None):
        LOGGER.info("%s has no manifest: its files are not verified", step)
    source = config_folder(step, config_name)
    config = family.load_config(source)
    split = read_split(
        step,
        model_type=family.name,
        model_layers=config.num_hidden_layers,
        n_stages=n_stages,
        n_layer_per_stage=n_layer_per_stage,
    )
    modules = open_checkpoint(step, family, config, split)
    entries = [w.file.entries[w.key] for module in modules for w in module.values()]
    widest = functools.reduce(torch.promote_types, (DTYPES[entry.dtype] for entry in entries))
    dtype = torch.float16 if fp16 else widest
    sizes = [sum(weight.num_bytes(dtype) for weight in module.values()) for module in modules]

    def read(index: int) -> dict[str, Tensor]:
        names = hf_names(family, config, index)
        return {names[key]: weight for key, weight in read_module(modules[index], dtype).items()}

    with new_folder(save_path, needed=sum(sizes)) as folder:
        write_model(folder, sizes, read)
        copy_companions(source, folder)
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
        name = str(dtype).removeprefix("torch.")
        write_config(source, folder, architectures=[architecture], dtype=name)
        if verify:
            verify_logits(folder, family, config, modules, dtype)
    LOGGER.info("%s is complete", save_path)
    return save_path


def config_folder(step: Path, config_name: str | None) -> Path:
    """Returns the folder of config and tokenizer: that of --config-name or, without it, the step.

    Raises ValueError if there is no such folder, or the step lacks config.json.
    """
    if config_name is not None:
        return find_model(config_name, flag="--config-name", weights=False)
    if not (step / "config.json").is_file():
        raise ValueError(
            f"--config-name is missing, and {step} has no config.json: expected a folder or hub "
            "name of config and tokenizer"
        )
    return step
