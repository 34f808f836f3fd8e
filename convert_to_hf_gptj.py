"""Converts a GPT-J training checkpoint to the Hugging Face format."""

from __future__ import annotations

from arguments.conversion import parse_convert_to_hf
from arguments.parser import refuse
from modules.registry import MODELS


def main() -> None:
    """torch is imported once the flags are right."""
    args = parse_convert_to_hf("gptj")
    from checkpoint.conversion.command import log_progress
    from checkpoint.conversion.to_hf import convert_to_hf

    log_progress()
    family = MODELS["gptj"].load()
    try:
        convert_to_hf(
            family,
            ckpt_path=args.ckpt_path,
            save_path=args.save_path,
            n_stages=args.n_stages,
            n_layer_per_stage=args.n_layer_per_stage,
            config_name=args.config_name,
            fp16=args.fp16,
            verify=args.verify,
        )
    except (ValueError, OSError) as error:
        refuse(error)


if __name__ == "__main__":
    main()
