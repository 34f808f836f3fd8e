"""Seeds derived from their purpose, so that no generator's state need be saved."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a 63-bit seed that depends on `parts` and their order, equal on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
