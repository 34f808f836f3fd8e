"""Seeds from the run's seed and a purpose, so that checkpoints need no state of a generator.

`derive_seed` makes a seed from several parts. The first part is the run's seed, or a seed that was
derived from it. The second part, except in the seed of a dropout mask, is one of these words:

    "weights"   random initial weights, by module
    "source"    the order of a source's documents, by the number of the source in --task-name
    "order"     the order of the documents in an epoch, if the source can be read in any order
    "files"     the order of the files in an epoch, if the source is read in chunks
    "chunk"     the order of the documents in a chunk
    "round"     a round of a permutation, by number; the first part is a seed made with "order"
    "mixture"   the source of each block
    "dropout"   the dropout keys, by update and sequence (a mask's parts: a key and a layer's name)

Do not change these words or the order of the parts, because a run that was saved before the change
could not resume exactly.
"""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that depends on `parts` and their order, equal on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def dropout_keys(seed: int, *, update: int, first: int, count: int) -> list[int]:
    """Returns the dropout keys of `count` sequences of an update, from sequence `first` on.

    A key depends only on the run's seed, the update, and the number of the sequence in the global
    batch. The dropout masks are therefore the same for every number of stages and replicas, in
    recomputation, and after a resume.
    """
    return [derive_seed(seed, "dropout", update, first + number) for number in range(count)]
