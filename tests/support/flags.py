"""Flags of dist_clm_train.py as a user writes them, by name."""


def flags_of(line: str) -> dict[str, str]:
    """Returns the values by name of flags such as `--lr 1e-3 --bf16`; one without a value is true."""
    flags = {}
    for part in f" {' '.join(line.split())}".split(" --")[1:]:
        name, _, value = part.partition(" ")
        flags[name] = value or "true"
    return flags
