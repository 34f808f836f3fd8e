"""The weights of a training checkpoint, which this project or an older system has saved.

A step's folder has one file `prank_<i>_checkpoint.pt` per stage. The keys in the file are
`<j>.<name>`, where the number j counts the modules of the stage from 0. The files of an older
system (a predecessor, see docs/glossary.md) also contain buffers, which are ignored.
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
    """Returns the folder of a step: `path` itself if it has no file `latest`, else a folder in it.

    `latest` contains only a number N. It names the folder `N` if this folder exists, else the
    folder `checkpoint_N`.

    Raises:
        ValueError: a folder is missing, `latest` is not a number, or `check_latest` finds an error.
            The text names the path.
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
        f"{latest}: names step {text}, but neither {text}/ nor checkpoint_{text}/ exists"
    )


def open_checkpoint(folder: Path, family: Family, config: Any, split: Split) -> list[ModuleWeights]:
    """Returns a mapping for each module of the model: from a weight's name to its file and key.

    The weights are in the files of all stages. Raises ValueError as `open_stage` does.
    """
    modules: list[ModuleWeights] = []
    for stage in range(len(split)):
        path = folder / part_name(stage, "checkpoint")
        modules += open_stage(path, family, config, stage_modules(stage, split))
    return modules


def open_stage(
    path: Path, family: Family, config: Any, indices: Sequence[int]
) -> list[ModuleWeights]:
    """Returns a mapping for each module of a stage: from a weight's name to its file and key.

    Only the header of the file `path` is read. `indices` are the numbers of the stage's modules in
    the model.

    Raises:
        ValueError: the file is missing or damaged, a key is missing or extra, a shape does not
            match the config, or a type is not a float. The text names file and key.
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
    """Returns the weights of one module of a stage by name, with the types they have in the file.

    `indices` are the numbers of the stage's modules in the model, and `index_in_stage` is the
    position of the module in `indices`. Keys and shapes of all these modules are checked.

    Raises:
        ValueError: a weight is not finite, or `open_stage` finds an error.
    """
    return read_module(open_stage(path, family, config, indices)[index_in_stage])
