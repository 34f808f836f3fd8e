"""Seeds derived from their purpose, so that no generator's state need be saved.

The first parts of a seed are the run's seed and one of these words:

    "weights"   random initial weights, by module
    "source"    the order of a source's documents, by its place in --task-name
    "order"     the order of an epoch;  "round": a round of its permutation
    "mixture"   the source of each block
    "dropout"   the masks, by update, sequence and layer

Another word or another order of the parts gives other bits: no run made before could be resumed.
"""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that depends on `parts` and their order, equal on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def dropout_keys(seed: int, *, update: int, first: int, count: int) -> list[int]:
    """Derives the dropout keys of `count` sequences of an update, from sequence `first` on.

    A key depends on the run's seed, the update and the number of the sequence in the global batch
    alone: the masks are the same for every number of stages and replicas, in recomputation, and
    after a resume.
    """
    return [derive_seed(seed, "dropout", update, first + number) for number in range(count)]
