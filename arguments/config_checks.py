"""Checks of flags against config.json and installed packages. The module imports no torch."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arguments.settings import Settings
from common.files import read_json_object
from modules.registry import MODELS
from pipeline_parallel.partition.split import check_split


def check_model(settings: Settings) -> None:
    """Checks the flags against the config.json of --model-name.

    Raises:
        ValueError: flags contradict config.json, or config.json is not readable.
    """
    model, seq_length = settings.model, settings.update.seq_length
    entry, path = MODELS[model.model_type], model.model_name / "config.json"
    if not model.model_name.is_dir():
        raise ValueError(f"--model-name {model.model_name}: no such folder")
    try:
        config = read_json_object(path)
    except ValueError as error:
        raise ValueError(f"--model-name {model.model_name}: {error}") from error
    if config.get("model_type") != entry.hf_model_type:
        raise ValueError(
            f"--model-type {model.model_type} needs model_type {entry.hf_model_type!r}, but {path} "
            f"has {config.get('model_type')!r}"
        )
    hidden, layers, positions = (
        _config_number(config, path, key)
        for key in (entry.hidden_size, entry.num_layers, entry.max_positions)
    )
    if model.embedding_dim != hidden:
        raise ValueError(f"--embedding-dim {model.embedding_dim}, but {path} has {hidden}")
    if seq_length > positions:
        raise ValueError(f"--seq-length {seq_length}: {path} allows at most {positions}")
    num_stages = settings.parallel.pipeline_group_size
    check_split(model.num_layers, num_stages=num_stages, model_layers=layers)


def check_optimizer(settings: Settings) -> None:
    """Raises ValueError if this machine lacks a package that --optimizer needs."""
    if settings.update.optimizer == "8bit-adam" and find_spec("bitsandbytes") is None:
        raise ValueError(
            "--optimizer 8bit-adam needs bitsandbytes, which is not installed: "
            "`pip install bitsandbytes`"
        )


def _config_number(config: Mapping[str, Any], path: Path, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{path}: {key} is {value!r}, expected a whole number above 0")
    return value
