"""The split of the layers of a training checkpoint, from its meta.json or from flags."""

from pathlib import Path

from checkpoint.steps.manifest import part_name
from checkpoint.steps.meta import META, StepMeta, is_predecessors, read_meta
from pipeline_parallel.partition.split import Layers, Split, even_split


def read_split(
    folder: Path,
    *,
    model_type: str,
    model_layers: int,
    n_stages: int | None,
    n_layer_per_stage: Layers | None,
) -> Split:
    """Returns the split in a step's meta.json, or else the split that the flags give.

    A checkpoint of an older system (a predecessor, see docs/glossary.md) has no split in meta.json.

    Raises:
        ValueError: flags and meta.json differ, or both lack the split; the model type is not
            `model_type`; the sum of the split is not `model_layers`; or the folder has a file of a
            stage that the split lacks. The text names the flag or the file, and the values that
            differ.
    """
    path = folder / META
    if is_predecessors(folder):
        split = _split_of_flags(path, model_layers, n_stages, n_layer_per_stage)
    else:
        meta = read_meta(folder)
        if meta.model_type != model_type:
            raise ValueError(f"{path}: model_type is {meta.model_type!r}, expected {model_type!r}")
        split = saved_split(meta, folder, model_layers=model_layers)
        if n_stages not in (None, len(split)):
            raise ValueError(f"--n-stages is {n_stages}, but {path} says {len(split)}")
        layers: tuple[int, ...] | Layers | None = n_layer_per_stage
        if isinstance(layers, int):
            layers = even_split(layers, num_stages=len(split), model_layers=model_layers)
        if layers not in (None, split):
            raise ValueError(f"--n-layer-per-stage is {n_layer_per_stage}, but {path} says {split}")
    extra = folder / part_name(len(split), "checkpoint")
    if extra.exists():
        raise ValueError(f"{extra}: this file exists, but --n-stages is {len(split)}")
    return split


def saved_split(meta: StepMeta, folder: Path, *, model_layers: int) -> Split:
    """Returns the split in `meta`; raises ValueError if its sum is not `model_layers`."""
    if sum(meta.num_layers) != model_layers:
        raise ValueError(
            f"{folder / META}: num_layers is {meta.num_layers}, a total of {sum(meta.num_layers)}, "
            f"but config.json has {model_layers} layers"
        )
    return meta.num_layers


def _split_of_flags(
    path: Path, model_layers: int, stages: int | None, layers: Layers | None
) -> Split:
    """Returns the split from --n-stages and --n-layer-per-stage.

    If `layers` is a list, its length gives the number of stages. `path` is meta.json, for an error
    text. Raises ValueError if a flag is missing or the flags do not fit the model.
    """
    if isinstance(layers, Split) and stages is None:
        stages = len(layers)
    if stages is None or layers is None:
        flag = "--n-stages" if stages is None else "--n-layer-per-stage"
        raise ValueError(f"{flag} is missing, and {path} lacks its value: expected a number")
    flags = f"--n-stages {stages} with --n-layer-per-stage {layers}"
    if isinstance(layers, Split):
        if (len(layers), sum(layers)) != (stages, model_layers):
            raise ValueError(
                f"{flags}, which is {sum(layers)} layers on {len(layers)} stages, but config.json "
                f"has {model_layers} layers"
            )
        return layers
    if not (stages - 1) * layers < model_layers <= stages * layers:
        raise ValueError(
            f"{flags} is a split of {(stages - 1) * layers + 1} to {stages * layers} layers, "
            f"but config.json has {model_layers}"
        )
    return Split(even_split(layers, num_stages=stages, model_layers=model_layers))
