"""What an evaluation found: a loss over all held-out text, and one for each of its named sets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple


class SetLoss(NamedTuple):
    """A set's mean loss of a trained token, in nats, and how many of them it has."""

    loss: float
    tokens: int


@dataclass(frozen=True)
class HeldOut:
    """`loss` is the mean over the trained tokens of all sets, in nats.

    `sets` is by name; empty where the text is one set without a name.
    """

    loss: float
    sets: Mapping[str, SetLoss] = field(default_factory=dict)

    def sets_to_json(self) -> dict[str, dict[str, float | None]] | None:
        """Each set's loss, perplexity and tokens, None for what is not finite; None for no sets."""
        return {
            name: {
                "loss": finite_or_none(one.loss),
                "perplexity": finite_or_none(perplexity(one.loss)),
                "tokens": one.tokens,
            }
            for name, one in self.sets.items()
        } or None


def perplexity(loss: float) -> float:
    """The exponential of a token-averaged loss in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def finite_or_none(value: float | None) -> float | None:
    """What JSON can hold of a number."""
    return value if value is not None and math.isfinite(value) else None
