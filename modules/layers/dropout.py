"""Dropout with masks that depend on (seed, update, sequence, layer) alone.

A pipeline runs a block again in backward, a resumed run repeats nothing, and another (P, R) gives
the same sequence to another process: all must draw the same mask. So no generator keeps a state
from call to call: each row of a microbatch has a key, and each mask is drawn from that key and the
name of its site.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.seeds import derive_seed

Keys = Sequence[int] | None  # one for each row; None for no dropout


class KeyedDropout(nn.Module):
    """Inverted dropout of probability `p`; `site` names its place in the model, with the layer."""

    def __init__(self, p: float, site: str) -> None:
        super().__init__()
        self.p = p
        self.site = site

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        """Applies dropout to `x` (rows, ...), with one key for each row."""
        if keys is None or self.p == 0.0:
            return x
        mask = torch.empty_like(x)
        self.draw_(mask, keys)
        return x * mask / (1.0 - self.p) if self.p < 1.0 else x * 0.0

    def draw_(self, mask: Tensor, keys: Sequence[int]) -> None:
        """Fills each row of `mask` from its key."""
        generator = torch.Generator(device=mask.device)
        for row, key in enumerate(keys):
            generator.manual_seed(derive_seed(key, self.site))
            mask[row].bernoulli_(1.0 - self.p, generator=generator)
