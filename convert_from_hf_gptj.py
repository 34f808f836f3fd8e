"""Converts a Hugging Face GPT-J model to the layer shards that training starts from."""

from __future__ import annotations

from argument_parsing import refuse
from arguments import parse_convert_from_hf
from modules.registry import MODELS


def main() -> None:
    """torch is imported once the flags are right."""
    args = parse_convert_from_hf("gptj")
    from checkpoint.convert_from_hf import convert_from_hf
    from checkpoint.progress_log import log_progress

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
