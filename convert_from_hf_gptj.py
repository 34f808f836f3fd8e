"""Converts a Hugging Face GPT-J model to the layer shards that training starts from."""

from __future__ import annotations

from arguments.conversion import parse_convert_from_hf
from arguments.parser import refuse
from modules.registry import MODELS


def main() -> None:
    """torch is imported once the flags are right."""
    args = parse_convert_from_hf("gptj")
    from checkpoint.conversion.command import log_progress
    from checkpoint.conversion.from_hf import convert_from_hf

    log_progress()
    family = MODELS["gptj"].load()
    try:
        convert_from_hf(
            family, model_name=args.model_name, save_dir=args.save_dir, dtype=args.dtype
        )
    except (ValueError, OSError) as error:
        refuse(error)


if __name__ == "__main__":
    main()
