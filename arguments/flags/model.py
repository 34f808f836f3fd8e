"""Flags of the model."""

from __future__ import annotations

from pathlib import Path

from arguments.flag import Flag
from arguments.values import layers, switch, whole
from modules.registry import MODELS

MODEL_FLAGS = (
    Flag(
        "--model-name",
        "folder of layer shards, on each rank's disk",
        required=True,
        type=Path,
        is_common=True,
        across_ranks="own",
    ),
    Flag(
        "--tokenizer-name",
        "folder or hub name; default: --model-name",
        on_resume="may change",
        across_ranks="own",
    ),
    Flag(
        "--model-type",
        "model family",
        required=True,
        choices=sorted(MODELS),
        is_common=True,
        on_resume="must match",
    ),
    Flag(
        "--num-layers",
        "layers per stage, of which the last may have fewer; or a list of each stage's, as 5,3; or "
        "auto: the split whose slowest stage has the fewest multiply-adds",
        required=True,
        type=layers(auto=True),
        is_common=True,
    ),
    Flag(
        "--embedding-dim",
        "hidden size, as config.json has it",
        required=True,
        type=whole(1),
        is_common=True,
    ),
    Flag(
        "--load-pretrained-model",
        "false: random weights from config.json and --seed",
        default=True,
        type=switch,
    ),
)
