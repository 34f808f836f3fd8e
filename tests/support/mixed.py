"""Flags of the tests of mixed precision, and the metrics that they compare."""

from pathlib import Path
from typing import Any

from monitor.metrics import read_metrics
from tests.support.cases import run_folder
from tests.support.flags import flags_of
from tests.support.fp16_twin import LAYERS, ROWS

KEYS = ("loss", "lr", "grad_norm", "loss_scale")


def layers_of_a_stage(stages: int, replicas: int) -> int:
    return LAYERS // stages


def rows_of_a_replica(stages: int, replicas: int) -> int:
    return ROWS // replicas


def model_flags(folder: Path) -> dict[str, Any]:
    """Returns the flags of model and data for all runs in mixed precision."""
    return flags_of(f"""
        --model-name {folder}/shards/model --model-type gptneox --embedding-dim 32
        --task-name {folder}/a.jsonl
    """) | {"num-layers": layers_of_a_stage}


def lines_of(folder: Path, name: str, stages: int, replicas: int) -> list[dict[str, Any]]:
    lines = read_metrics(run_folder(folder, name, stages, replicas) / "metrics.jsonl")
    return [{key: line[key] for key in KEYS if key in line} for line in lines]
