"""Converts a GPT-NeoX training checkpoint to the Hugging Face format."""

from arguments.conversion import parse_convert_to_hf
from checkpoint.conversion.command import run_to_hf

if __name__ == "__main__":
    run_to_hf("gptneox", vars(parse_convert_to_hf("gptneox")))
