"""Dropout with masks that depend only on (seed, update, sequence, layer).

The mask of a sequence must be the same when a block is computed again in backward (recompute),
after a resume, and with another number of stages and replicas. So no generator keeps a state
between calls: the seed of each mask is made from a key and a name. Each row of a microbatch has a
key, made from the run's seed, the update and the sequence (`common.seeds.dropout_keys`). Each
dropout has a name (`site`), which includes its layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.seeds import derive_seed

Keys = Sequence[int] | None  # one for each row; None for no dropout


class KeyedDropout(nn.Module):
    """Inverted dropout with probability `p`; `site` names this dropout and its layer."""

    def __init__(self, p: float, site: str) -> None:
        super().__init__()
        self.p = p
        self.site = site

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        """Returns `x` (rows, ...) with dropout; `keys` has one key for each row."""
        if keys is None or self.p == 0.0:
            return x
        mask = torch.empty_like(x)
        self.draw_(mask, keys)
        return x * mask / (1.0 - self.p) if self.p < 1.0 else x * 0.0

    def draw_(self, mask: Tensor, keys: Sequence[int]) -> None:
        """Fills each row of `mask` with 0 and 1, drawn with the row's key."""
        generator = torch.Generator(device=mask.device)
        for row, key in enumerate(keys):
            generator.manual_seed(derive_seed(key, self.site))
            mask[row].bernoulli_(1.0 - self.p, generator=generator)
