"""The weights of a training checkpoint, ours or a predecessor's: where they are, reading them.

A step's folder has one `prank_<i>_checkpoint.pt` per stage with keys `<j>.<name>`, j counting the
stage's modules from 0. Predecessors' hold buffers too, which are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.files.hf_weights import HfWeights, read_module
from checkpoint.files.tensor_files import TorchFile
from checkpoint.files.validation import check_entry, check_keys, module_shapes
from checkpoint.steps.latest import CHECK, check_latest
from checkpoint.steps.manifest import manifest_name
from modules.families.base import Family
from pipeline_parallel.partition.split import Split, stage_modules


def stage_file(folder: Path, stage: int) -> Path:
    """The weights of one stage in a step's folder."""
    return folder / f"prank_{stage}_checkpoint.pt"


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a step: `path` itself, or the one that `path`/latest names.

    `latest` holds a bare number N, which means `N` where there is such a folder, else
    `checkpoint_N`. Raises ValueError, naming the file or folder, where there is none, or where
    `latest` is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder, expected a training checkpoint")
    latest = path / "latest"
    if latest.is_file() or (path / CHECK).is_file():
        check_latest(path, has_manifests=any(path.glob(f"*/{manifest_name('*')}")))
    if not latest.is_file():
        return path
    text = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError(f"{latest}: holds {text[:40]!r}, expected the number of a step")
    folders = (path / text, path / f"checkpoint_{text}")
    for folder in folders:
        if folder.is_dir():
            return folder
    raise ValueError(
        f"{latest}: names step {text}, but neither {text}/ nor checkpoint_{text}/ is there"
    )


def open_checkpoint(
    folder: Path, family: Family, config: Any, split: Split
) -> list[dict[str, HfWeights]]:
    """For each module, shard key to where that weight is; nothing is read but the files' headers.

    Raises ValueError as `open_stage` does.
    """
    modules: list[dict[str, HfWeights]] = []
    for stage in range(len(split)):
        indices = stage_modules(stage, split)
        modules += open_stage(stage_file(folder, stage), family, config, indices)
    return modules


def open_stage(
    path: Path, family: Family, config: Any, indices: Sequence[int]
) -> list[dict[str, HfWeights]]:
    """As `open_checkpoint`, of one stage that holds the model's modules `indices`.

    Raises ValueError, naming file and key, for a missing or damaged file, a missing or extra key,
    another shape than the config's, and a type that is no float's.
    """
    file = TorchFile(path)
    shapes = [module_shapes(family, config, index) for index in indices]
    expected = [f"{j}.{key}" for j, module in enumerate(shapes) for key in module]
    check_keys(path, (key for key in file.entries if not family.buffers.search(key)), expected)
    for j, module in enumerate(shapes):
        for key, shape in module.items():
            check_entry(path, f"{j}.{key}", file.entries[f"{j}.{key}"], shape)
    return [
        {key: HfWeights(file, f"{j}.{key}") for key in module} for j, module in enumerate(shapes)
    ]


def read_stage_module(
    path: Path, family: Family, config: Any, indices: Sequence[int], index_in_stage: int
) -> dict[str, Tensor]:
    """The weights of one module of a stage, in the types they are saved in, all finite.

    `indices` are the modules of the whole stage, since the file is checked whole: what is wrong
    anywhere in it is raised as `open_stage` does.
    """
    return read_module(open_stage(path, family, config, indices)[index_in_stage])
