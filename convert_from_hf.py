"""Converts a Hugging Face model of any family to the layer shards that training starts from."""

from arguments.conversion import parse_convert_from_hf
from checkpoint.conversion.command import run_from_hf

if __name__ == "__main__":
    run_from_hf(None, vars(parse_convert_from_hf()))
