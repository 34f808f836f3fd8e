"""The meta.json of a step: the data about the run that a checkpoint stores."""

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

    step, updates: the number of iterations so far, and the number of updates so far.
    update_step: the number of skipped updates in a row, and the state of the loss scaler.
    gave_up: whether the run ended because it skipped too many updates in a row.
    num_layers: the number of layers on each stage.
    flags: the values of the flags that must be the same when the run resumes.
    settings: the values of the flags that can change when the run resumes.
    versions: the versions of Python and of the libraries.
    data: the state of the data stream.
    cpu_matmul: the matmul library of each rank on CPUs; None on GPUs.
    wandb_id: the id of the run at Weights & Biases.
    start: an id that is new each time the program starts; it shows which start saved the step.
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
        """Returns the StepMeta that `value` describes; `value` is the JSON content of `path`.

        Raises ValueError if a field is missing, unknown or wrong; the text names file and field.
        """
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
        """Returns the content of meta.json as a JSON object."""
        return {**vars(self), "num_stages": len(self.num_layers), "format": FORMAT}

    def encode(self) -> bytes:
        """Returns the content of meta.json as bytes."""
        return json.dumps(self.to_json(), indent=1, sort_keys=True).encode()


def read_meta(folder: Path) -> StepMeta:
    """Returns the content of a step's meta.json.

    Raises ValueError if the file or a field is wrong; the text names file and field.
    """
    return StepMeta.from_json(read_json_object(folder / META), folder / META)


def is_predecessors(folder: Path) -> bool:
    """Returns whether an older system (a predecessor, see docs/glossary.md) wrote the folder.

    Such a folder has no meta.json, or its meta.json contains only the step.
    """
    path = folder / META
    return not path.is_file() or read_json_object(path).keys() <= {"step"}
