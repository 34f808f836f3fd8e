"""The folder of a model: its config and tokenizer files, local or downloaded from the hub."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from common.files import read_json_object, write_json
from common.text import one_line

COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "generation_config.json",
)
_SAFETENSORS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
_TORCH_BINS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


def companion_files(folder: Path) -> list[Path]:
    """Returns the tokenizer files and generation settings of a folder, without config.json."""
    paths = {path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(paths)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer files and generation settings of `source` to `target`, if any exist."""
    for path in companion_files(source):
        shutil.copyfile(path, target / path.name)


def write_config(source: Path, target: Path, **changes: object) -> None:
    """Copies config.json from `source` to `target`; in the copy, sets the fields in `changes`.

    Before transformers 4.56 the field `dtype` had the name `torch_dtype`. If the config has this
    old field, a change of `dtype` changes the old field too.
    """
    config = read_json_object(source / "config.json") | changes
    if "dtype" in changes and "torch_dtype" in config:
        config["torch_dtype"] = changes["dtype"]
    write_json(target / "config.json", config)


def folder_name(model_name: str) -> str:
    """Returns the base name of a local folder, or a hub name with / replaced by _."""
    if Path(model_name).is_dir():
        return os.path.basename(os.path.abspath(model_name))
    return model_name.replace("/", "_")


def find_model(model_name: str, *, flag: str, weights: bool) -> Path:
    """Returns the local folder of a model; downloads the model from the hub if necessary.

    Args:
        model_name: a local folder or the name of a model on the hub.
        flag: the flag that gave `model_name`, for error texts.
        weights: whether a download includes the weights; it always includes config and tokenizer.

    Raises:
        ValueError: there is no such folder, and the hub lacks the model or cannot be reached.
    """
    if Path(model_name).is_dir():
        return Path(model_name)
    small = ("config.json", *COMPANIONS)
    folder = _download(model_name, flag, (*small, *_SAFETENSORS) if weights else small)
    if weights and not any(folder.glob("model*.safetensors")):
        folder = _download(model_name, flag, _TORCH_BINS)
    return folder


def _download(model_name: str, flag: str, patterns: Sequence[str]) -> Path:
    try:
        folder = snapshot_download(
            model_name, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )
    except (OSError, ValueError) as error:
        reason = one_line(error)[:200]
        raise ValueError(
            f"{flag} {model_name}: no such folder, and the download from the hub failed: {reason}"
        ) from error
    return Path(folder)
