"""The table of model families; it has only names, so that flags can be checked without torch.

A new family needs one line here and one file that defines `FAMILY` (see `modules.families.base`).
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import read_json_object

if TYPE_CHECKING:
    from modules.families.base import Family


@dataclass(frozen=True)
class ModelEntry:
    """A model family: its module, its Hugging Face name, and config keys used to check flags.

    family: the name of the `Family` in the module.
    """

    module: str
    hf_model_type: str
    hidden_size: str
    num_layers: str
    max_positions: str
    family: str = "FAMILY"

    def load(self) -> "Family":
        """Imports the family's module (and so torch and transformers) and returns the family."""
        family: Family = getattr(importlib.import_module(self.module), self.family)
        return family


SIZES = ("hidden_size", "num_hidden_layers", "max_position_embeddings")  # most families' keys

MODELS: dict[str, ModelEntry] = {
    "gptj": ModelEntry("modules.families.gptj", "gptj", "n_embd", "n_layer", "n_positions"),
    "gptneox": ModelEntry("modules.families.gptneox", "gpt_neox", *SIZES),
    "llama": ModelEntry("modules.families.llama", "llama", *SIZES),
    "mistral": ModelEntry("modules.families.mistral", "mistral", *SIZES),
    "qwen2": ModelEntry("modules.families.qwen", "qwen2", *SIZES, family="QWEN2"),
    "qwen3": ModelEntry("modules.families.qwen", "qwen3", *SIZES, family="QWEN3"),
}


def model_type_of(folder: Path) -> str:
    """Returns the key in MODELS of the model in a folder, from the folder's config.json.

    Raises ValueError if config.json is missing or not readable, or if its model_type is not here.
    """
    path = folder / "config.json"
    hf_name = read_json_object(path).get("model_type")
    for name, entry in MODELS.items():
        if entry.hf_model_type == hf_name:
            return name
    known = ", ".join(entry.hf_model_type for entry in MODELS.values())
    raise ValueError(f"{path}: model_type is {hf_name!r}, expected one of {known}")
