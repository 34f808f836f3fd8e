"""Initial weights of a stage, from layer shards, a checkpoint or a seed."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint.files.layer_shards import check_shard, load_layer_shard, shard_name
from checkpoint.files.tensor_files import require_file
from checkpoint.files.validation import check_fits
from checkpoint.resume.reshard import find_module
from checkpoint.steps.manifest import part_name
from checkpoint.steps.stage_weights import read_stage_module
from comm.communicator import Communicator
from modules.build import initialise_
from modules.families.base import Family
from modules.stage_model import StageModel
from pipeline_parallel.partition.split import Split, stage_modules


def load_shards_(
    model: StageModel,
    folder: Path,
    family: Family,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fills a stage with weights from its layer shards in `folder`, one layer at a time.

    Args:
        dtype: the compute type of the training; the weights must fit this type.

    Raises:
        ValueError: a file is missing, differs from the folder's manifest (if there is a manifest),
            or has wrong weights. The text names file and key. If any file is missing, no file is
            read.
    """
    paths = [folder / shard_name(index, config.num_hidden_layers) for index in model.indices]
    for path in paths:
        require_file(path)
    for index, path, module in zip(model.indices, paths, model, strict=True):
        check_shard(path)
        weights = load_layer_shard(folder, family, config, index)
        check_fits(path, weights, dtype)
        _fill(module, weights)


def load_checkpoint_(
    model: StageModel,
    folder: Path,
    split: Split,
    family: Family,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Fills a stage with weights from a training checkpoint; reads only the stage's modules.

    The checkpoint can be from this project or an older system (a predecessor, see
    docs/glossary.md). `split` is the split of the checkpoint.

    Raises:
        ValueError: a file is missing or has wrong weights. The text names file and key.
    """
    for index, module in zip(model.indices, model, strict=True):
        stage, j = find_module(index, split)
        path = folder / part_name(stage, "checkpoint")
        weights = read_stage_module(path, family, config, stage_modules(stage, split), j)
        check_fits(path, {f"{j}.{key}": weight for key, weight in weights.items()}, dtype)
        _fill(module, weights)


def initialise_model_(model: StageModel, config: Any, *, seed: int) -> None:
    """Fills a stage with random weights, which depend only on the seed and the module's index."""
    for index, module in zip(model.indices, model, strict=True):
        initialise_(module, std=config.initializer_range, seed=seed, index=index)


def share_from_first(tensors: Iterable[Tensor], replicas: Communicator) -> None:
    """Copies the tensors of replica 0 to every other replica."""
    for tensor in tensors:
        replicas.broadcast(tensor.detach(), root=0)


@torch.no_grad()
def _fill(module: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])
