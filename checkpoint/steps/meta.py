"""The meta.json of a step: the facts about a run that its checkpoint records."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.files.checksums import FORMAT
from common.files import read_json_object
from modules.matmul.backend import Matmul
from pipeline_parallel.partition.split import Split

META = "meta.json"
_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "updates": (int,),
    "update_step": (dict,),
    "gave_up": (bool,),
    "model_type": (str,),
    "num_stages": (int,),
    "num_layers": (list,),
    "num_replicas": (int,),
    "flags": (dict,),
    "settings": (dict,),
    "versions": (dict,),
    "data": (dict,),
    "cpu_matmul": (list, type(None)),
    "wandb_id": (str, type(None)),
    "start": (str,),
    "format": (int,),
}


@dataclass(frozen=True, kw_only=True)
class StepMeta:
    """The content of a step's meta.json.

    step, updates: the iterations and the optimizer's updates so far.
    update_step: the state of the update step, with the loss scaler's.
    gave_up: whether the run ended because it skipped too many updates in a row.
    num_layers: the layers of each stage.
    flags: the flags that a resumed run must share, with their values.
    settings: the flags that a resumed run may change.
    versions: of Python and of the libraries.
    data: the state of the data stream.
    cpu_matmul: the matmul of each rank on a CPU; None on GPUs.
    wandb_id: the run's id at Weights & Biases.
    start: the nonce of the start that saved the step.
    """

    step: int
    updates: int
    update_step: dict[str, Any]
    gave_up: bool
    model_type: str
    num_layers: Split
    num_replicas: int
    flags: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    data: Mapping[str, Any]
    cpu_matmul: Sequence[Matmul] | None = None
    wandb_id: str | None = None
    start: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any], path: Path) -> "StepMeta":
        """Returns the StepMeta that `path` holds as `value`; ValueError names file and field."""
        for name in sorted(_TYPES.keys() ^ value.keys()):
            problem = "missing" if name in _TYPES else "not a field of this version"
            raise ValueError(f"{path}: {name} is {problem}")
        for name, types in _TYPES.items():
            if type(value[name]) not in types:
                expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
                raise ValueError(f"{path}: {name} is {value[name]!r:.80}, expected {expected}")
        fields = dict(value)
        stages, counts = fields.pop("num_stages"), fields["num_layers"]
        if len(counts) != stages or not all(type(n) is int and n > 0 for n in counts):
            raise ValueError(
                f"{path}: num_stages is {stages} and num_layers is {counts}, expected one number "
                "of layers for each stage"
            )
        if fields.pop("format") != FORMAT:
            raise ValueError(f"{path}: format is {value['format']}, expected {FORMAT}")
        return cls(**{**fields, "num_layers": Split(counts)})

    def to_json(self) -> dict[str, Any]:
        """Returns the object that meta.json holds."""
        return {**vars(self), "num_stages": len(self.num_layers), "format": FORMAT}

    def encode(self) -> bytes:
        """Returns the file's content."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True).encode()


def read_meta(folder: Path) -> StepMeta:
    """Reads a step's meta.json; ValueError names the file, and the field that is wrong."""
    return StepMeta.from_json(read_json_object(folder / META), folder / META)


def is_predecessors(folder: Path) -> bool:
    """Whether a step's folder lacks a meta.json, or has one that holds the step alone."""
    path = folder / META
    return not path.is_file() or read_json_object(path).keys() <= {"step"}
