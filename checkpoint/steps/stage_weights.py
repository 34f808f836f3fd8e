"""The weights of a training checkpoint, ours or a predecessor's.

A step's folder has one `prank_<i>_checkpoint.pt` per stage with keys `<j>.<name>`, j counting the
stage's modules from 0. Predecessors' files hold buffers too, which are ignored.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.files.hf_weights import HfWeights, ModuleWeights, read_module
from checkpoint.files.tensor_files import TorchFile
from checkpoint.files.validation import check_entries, module_shapes
from checkpoint.steps.latest import CHECK, check_latest
from checkpoint.steps.manifest import manifest_name, part_name
from modules.families.base import Family
from pipeline_parallel.partition.split import Split, stage_modules


def resolve_checkpoint(path: Path) -> Path:
    """Returns the folder of a step: `path` itself, or the one that `path`/latest names.

    `latest` holds a bare number N, which means the folder `N` if it exists, else `checkpoint_N`.
    ValueError names the file or folder that is missing, or a damaged `latest`.
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
    for folder in (path / text, path / f"checkpoint_{text}"):
        if folder.is_dir():
            return folder
    raise ValueError(
        f"{latest}: names step {text}, but neither {text}/ nor checkpoint_{text}/ is there"
    )


def open_checkpoint(folder: Path, family: Family, config: Any, split: Split) -> list[ModuleWeights]:
    """Returns `open_stage` of all stages, which together have all modules of the model."""
    modules: list[ModuleWeights] = []
    for stage in range(len(split)):
        path = folder / part_name(stage, "checkpoint")
        modules += open_stage(path, family, config, stage_modules(stage, split))
    return modules


def open_stage(
    path: Path, family: Family, config: Any, indices: Sequence[int]
) -> list[ModuleWeights]:
    """Returns the places of the weights of a stage's modules; it reads the file's header alone.

    `indices` are the modules' numbers in the model.

    Raises:
        ValueError: names file and key: a missing or damaged file, a missing or extra key, a shape
            other than the config's, or a type that is not a float.
    """
    file = TorchFile(path)
    shapes = [module_shapes(family, config, index) for index in indices]
    expected = {
        f"{j}.{key}": shape for j, module in enumerate(shapes) for key, shape in module.items()
    }
    check_entries(file, family, expected)
    return [
        {key: HfWeights(file, f"{j}.{key}") for key in module} for j, module in enumerate(shapes)
    ]


def read_stage_module(
    path: Path, family: Family, config: Any, indices: Sequence[int], index_in_stage: int
) -> dict[str, Tensor]:
    """Reads the finite weights of one module of a stage, in the types that the file has.

    All modules of the stage, `indices`, are checked; ValueError as `open_stage`.
    """
    return read_module(open_stage(path, family, config, indices)[index_in_stage])
