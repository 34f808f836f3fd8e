"""Converts a training checkpoint of any family to the Hugging Face format."""

from arguments.conversion import parse_convert_to_hf
from checkpoint.conversion.command import run_to_hf

if __name__ == "__main__":
    run_to_hf(None, vars(parse_convert_to_hf()))
