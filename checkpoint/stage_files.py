"""The weights of a training checkpoint, ours or a predecessor's: where they are, reading them.

A step's folder has one `prank_<i>_checkpoint.pt` per stage with keys `<j>.<name>`, j counting the
stage's modules from 0. Predecessors' hold buffers too, which are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.hf_files import Source, read_module
from checkpoint.model_folder import read_json_object
from checkpoint.strict import check_entry, check_keys, module_shapes
from checkpoint.tensor_files import TorchFile
from modules.family import Family
from modules.stage_model import stage_modules


@dataclass(frozen=True)
class Split:
    """How the blocks of a model are cut: stage i has blocks [i * num_layers, (i + 1) * num_layers),
    the last stage what is left."""

    num_stages: int
    num_layers: int


def stage_file(folder: Path, stage: int) -> Path:
    """The weights of one stage in a step's folder."""
    return folder / f"prank_{stage}_checkpoint.pt"


def resolve_checkpoint(path: Path) -> Path:
    """The folder of a step: `path` itself, or the one that `path`/latest names.

    `latest` holds a bare number N, which means `N` where there is such a folder, else
    `checkpoint_N`. Raises ValueError, naming the file or folder, where there is none.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder, expected a training checkpoint")
    latest = path / "latest"
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


def read_split(
    folder: Path,
    *,
    model_type: str,
    model_layers: int,
    n_stages: int | None,
    n_layer_per_stage: int | None,
) -> Split:
    """The split that a step's meta.json tells, or, where it tells none, that of the flags.

    Raises ValueError, naming flag and both values, where they differ, where neither tells, where
    the checkpoint is of another model type, and where the split does not fit `model_layers`.
    """
    path = folder / "meta.json"
    meta = read_json_object(path) if path.is_file() else {}
    if meta.get("model_type", model_type) != model_type:
        raise ValueError(f"{path}: model_type is {meta['model_type']!r}, expected {model_type!r}")
    told = _told_split(path, meta)
    split = Split(
        _agree("--n-stages", n_stages, told.num_stages if told else None, path),
        _agree("--n-layer-per-stage", n_layer_per_stage, told.num_layers if told else None, path),
    )
    _check_fits(split, model_layers)
    counts = [_count(split, stage, model_layers) for stage in range(split.num_stages)]
    if told and counts != meta["num_layers"]:
        raise ValueError(
            f"{path}: num_layers is {meta['num_layers']}, expected {counts} for the "
            f"{model_layers} layers that config.json has"
        )
    if stage_file(folder, split.num_stages).exists():
        extra = stage_file(folder, split.num_stages)
        raise ValueError(f"{extra}: is there, but --n-stages is {split.num_stages}")
    return split


def _told_split(path: Path, meta: dict[str, Any]) -> Split | None:
    """Predecessors' meta.json tells the step at most."""
    if "num_stages" not in meta and "num_layers" not in meta:
        return None
    stages, counts = meta.get("num_stages"), meta.get("num_layers")
    whole = isinstance(counts, list) and all(isinstance(count, int) for count in counts)
    if not whole or not counts or len(counts) != stages:
        raise ValueError(
            f"{path}: num_stages is {stages!r} and num_layers {counts!r}, expected a number of "
            "stages and as many numbers of layers"
        )
    return Split(stages, counts[0])


def _agree(flag: str, given: int | None, told: int | None, path: Path) -> int:
    if given is None and told is None:
        raise ValueError(f"{flag} is missing, and {path} does not tell it: expected a whole number")
    if given is not None and told is not None and given != told:
        raise ValueError(f"{flag} is {given}, but {path} says {told}")
    value = told if given is None else given
    assert value is not None
    return value


def _check_fits(split: Split, model_layers: int) -> None:
    stages, layers = split.num_stages, split.num_layers
    if not (stages - 1) * layers < model_layers <= stages * layers:
        raise ValueError(
            f"--n-stages {stages} with --n-layer-per-stage {layers} is a split of "
            f"{(stages - 1) * layers + 1} to {stages * layers} layers, "
            f"but config.json has {model_layers}"
        )


def _count(split: Split, stage: int, model_layers: int) -> int:
    return min(split.num_layers, model_layers - stage * split.num_layers)


def open_checkpoint(
    folder: Path, family: Family, config: Any, split: Split
) -> list[dict[str, Source]]:
    """For each module, shard key to where that weight is; nothing is read but the files' headers.

    Raises ValueError as `open_stage` does.
    """
    modules: list[dict[str, Source]] = []
    for stage in range(split.num_stages):
        indices = stage_modules(
            stage,
            num_stages=split.num_stages,
            num_layers=split.num_layers,
            model_layers=config.num_hidden_layers,
        )
        modules += open_stage(stage_file(folder, stage), family, config, indices)
    return modules


def open_stage(
    path: Path, family: Family, config: Any, indices: Sequence[int]
) -> list[dict[str, Source]]:
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
    return [{key: Source(file, f"{j}.{key}") for key in module} for j, module in enumerate(shapes)]


def read_stage_module(
    path: Path, family: Family, config: Any, indices: Sequence[int], index_in_stage: int
) -> dict[str, Tensor]:
    """The weights of one module of a stage, in the types they are saved in, all finite.

    `indices` are the modules of the whole stage, since the file is checked whole: what is wrong
    anywhere in it is raised as `open_stage` does.
    """
    return read_module(open_stage(path, family, config, indices)[index_in_stage])
