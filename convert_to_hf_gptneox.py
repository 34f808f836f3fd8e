"""Converts a GPT-NeoX training checkpoint to the Hugging Face format."""

from __future__ import annotations

from argument_parsing import refuse
from arguments import parse_convert_to_hf
from modules.registry import MODELS


def main() -> None:
    """torch is imported once the flags are right."""
    args = parse_convert_to_hf("gptneox")
    from checkpoint.convert_to_hf import convert_to_hf
    from checkpoint.progress_log import log_progress

    log_progress()
    family = MODELS["gptneox"].load()
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
