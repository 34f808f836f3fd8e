"""The flags of the conversion scripts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from arguments.flag import Flag
from arguments.parser import OneLineParser, refuse
from arguments.values import layers, switch, whole


def parse_convert_from_hf(
    family: str | None = None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parses the flags of convert_from_hf_<family>.py; exits with status 2 if a flag is wrong.

    Without a family, they are the same flags of convert_from_hf.py.
    """
    model = "model" if family is None else f"{family} model"
    parser = OneLineParser(f"Converts a Hugging Face {model} to layer shards.")
    add = parser.add_argument
    add("--model-name", required=True, help="folder in the Hugging Face format, or hub name")
    add(
        "--save-dir",
        required=True,
        type=Path,
        help="the shards are written to <save-dir>/<model name with / as _>",
    )
    add(
        "--dtype",
        choices=("keep", "fp16", "bf16", "fp32"),
        default="keep",
        help="type of the shards; keep: the type of the model",
    )
    return _parse_or_refuse(parser, argv)


def parse_convert_to_hf(
    family: str | None = None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parses the flags of convert_to_hf_<family>.py; exits with status 2 if a flag is wrong.

    Without a family, they are the same flags of convert_to_hf.py.
    """
    checkpoint = "training checkpoint" if family is None else f"{family} training checkpoint"
    parser = OneLineParser(f"Converts a {checkpoint} to the Hugging Face format.")
    add = parser.add_argument
    add(
        "--ckpt-path",
        required=True,
        type=Path,
        help="a step's folder, or the --checkpoint-path of training for the latest step",
    )
    add("--save-path", required=True, type=Path, help="the folder to write")
    add("--n-stages", type=whole(1), help="stages of the run; needed without meta.json")
    add(
        "--n-layer-per-stage",
        type=layers(auto=False),
        help="layers per stage, or a list such as 5,3; needed without meta.json",
    )
    add(
        "--config-name",
        help="folder or hub name of config and tokenizer, for checkpoints without them",
    )
    for flag, text in (
        ("--fp16", "write fp16 weights; false: the type in the checkpoint"),
        (
            "--verify",
            "compare the logits of the result with those of the checkpoint, layer by layer",
        ),
    ):
        Flag(flag, text, default=False, type=switch).add_to(parser, is_shown=True)
    return _parse_or_refuse(parser, argv)


def _parse_or_refuse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> argparse.Namespace:
    try:
        return parser.parse_args(argv)
    except ValueError as error:
        refuse(error)
