"""How the blocks in a training checkpoint are split: what its meta.json or a flag says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.steps.stage_weights import stage_file
from common.files import read_json_object
from pipeline_parallel.partition.split import Layers, Split, even_split


def read_split(
    folder: Path,
    *,
    model_type: str,
    model_layers: int,
    n_stages: int | None,
    n_layer_per_stage: Layers | None,
) -> Split:
    """The split that a step's meta.json tells, or, where it tells none, that of the flags.

    Raises ValueError, naming flag and both values, where they differ, where neither tells, where
    the checkpoint is of another model type, and where the split does not fit `model_layers`.
    """
    path = folder / "meta.json"
    meta = read_json_object(path) if path.is_file() else {}
    if meta.get("model_type", model_type) != model_type:
        raise ValueError(f"{path}: model_type is {meta['model_type']!r}, expected {model_type!r}")
    split = told_split(path, meta, model_layers)
    if split is None:
        split = _given_split(path, model_layers, n_stages, n_layer_per_stage)
    else:
        _check_given(path, split, n_stages, n_layer_per_stage)
    extra = stage_file(folder, len(split))
    if extra.exists():
        raise ValueError(f"{extra}: is there, but --n-stages is {len(split)}")
    return split


def told_split(path: Path, meta: Mapping[str, Any], model_layers: int) -> Split | None:
    """The split that `meta`, read from `path`, tells; None where it is a predecessor's, which tells
    the step at most. ValueError names the file where it is no split of `model_layers`."""
    if "num_stages" not in meta and "num_layers" not in meta:
        return None
    stages, counts = meta.get("num_stages"), meta.get("num_layers")
    whole = isinstance(counts, list) and all(type(count) is int and count > 0 for count in counts)
    if not whole or not counts or len(counts) != stages:
        raise ValueError(
            f"{path}: num_stages is {stages!r} and num_layers {counts!r}, expected a number of "
            "stages and as many numbers of layers"
        )
    if sum(counts) != model_layers:
        raise ValueError(
            f"{path}: num_layers is {counts}, {sum(counts)} in all, but config.json has "
            f"{model_layers} layers"
        )
    return Split(counts)


def kept_split(path: Path, meta: Mapping[str, Any], model_layers: int) -> Split:
    """As `told_split`, of a checkpoint that has to tell it; ValueError names the file else."""
    told = told_split(path, meta, model_layers)
    if told is None:
        raise ValueError(f"{path}: num_layers is missing, expected the layers of each stage")
    return told


def _check_given(path: Path, told: Split, stages: int | None, layers: Layers | None) -> None:
    """Flags need not be given where meta.json tells, but what is given must be the same."""
    if stages not in (None, len(told)):
        raise ValueError(f"--n-stages is {stages}, but {path} says {len(told)}")
    if layers is None:
        return
    given: tuple[int, ...] = (
        layers
        if isinstance(layers, Split)
        else even_split(layers, num_stages=len(told), model_layers=sum(told))
    )
    if given != told:
        raise ValueError(f"--n-layer-per-stage is {layers}, but {path} says {told}")


def _given_split(path: Path, model_layers: int, stages: int | None, layers: Layers | None) -> Split:
    """A list tells the number of stages too."""
    if isinstance(layers, Split) and stages is None:
        stages = len(layers)
    for flag, value in (("--n-stages", stages), ("--n-layer-per-stage", layers)):
        if value is None:
            raise ValueError(f"{flag} is missing, and {path} does not tell it: expected a number")
    assert stages is not None
    assert layers is not None
    given = f"--n-stages {stages} with --n-layer-per-stage {layers}"
    if isinstance(layers, Split):
        if (len(layers), sum(layers)) != (stages, model_layers):
            raise ValueError(
                f"{given}, which is {sum(layers)} layers on {len(layers)} stages, but config.json "
                f"has {model_layers} layers"
            )
        return layers
    if not (stages - 1) * layers < model_layers <= stages * layers:
        raise ValueError(
            f"{given} is a split of {(stages - 1) * layers + 1} to {stages * layers} layers, "
            f"but config.json has {model_layers}"
        )
    return Split(even_split(layers, num_stages=stages, model_layers=model_layers))
