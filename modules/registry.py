"""The table of model families; it has only names, so that flags can be checked without torch.

A new family needs one line here and one file that defines `FAMILY` (see `modules.families.base`).
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modules.families.base import Family


@dataclass(frozen=True)
class ModelEntry:
    """A model family: its module, its Hugging Face name, and config keys used to check flags."""

    module: str
    hf_model_type: str
    hidden_size: str
    num_layers: str
    max_positions: str

    def load(self) -> "Family":
        """Imports the family's module (and so torch and transformers) and returns the family."""
        family: Family = importlib.import_module(self.module).FAMILY
        return family


MODELS: dict[str, ModelEntry] = {
    "gptj": ModelEntry("modules.families.gptj", "gptj", "n_embd", "n_layer", "n_positions"),
    "gptneox": ModelEntry(
        "modules.families.gptneox",
        "gpt_neox",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
    ),
}
