"""Which replica steps which weight (stage 1 of ZeRO, Rajbhandari et al., arXiv 1910.02054).

Whole weights are dealt out, not slices of a flat buffer: a weight is then stepped exactly as it
would be without sharding, block-wise 8-bit moments included, so the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence


def deal_out(sizes: Sequence[int], num_owners: int) -> list[int]:
    """The owner of each weight, so that all own about as much: the largest first, each to whoever
    owns least so far. The same on all processes."""
    totals, owners = [0] * num_owners, [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = totals.index(min(totals))
        owners[index] = owner
        totals[owner] += sizes[index]
    return owners
