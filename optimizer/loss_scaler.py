"""The number that fp16 losses are multiplied by, so that small gradients do not vanish.

Micikevicius et al., arXiv 1710.03740. A scale is one number for all processes: each holds a scaler
of its own and feeds it the same verdicts, so that all move alike.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)

CONSTANT, DYNAMIC = "constant", "dynamic"  # the kinds that a state names


class LossScaler(Protocol):
    """`scale` is what the next update's losses are multiplied by.

    `may_skip` says whether gradients that are not finite cost the update (an fp16 overflow) or the
    run (anything else).
    """

    scale: float
    may_skip: bool

    def update(self, *, overflow: bool) -> None:
        """Takes note of how an update went."""

    def state(self) -> dict[str, Any]:
        """What `load_state` restores, with its kind."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores what `state()` of either kind gave, as far as the flags of now allow."""


class ConstantScale:
    """A scale that stays."""

    def __init__(self, scale: float, *, may_skip: bool) -> None:
        self.scale, self.may_skip = scale, may_skip

    def update(self, *, overflow: bool) -> None:
        """Nothing moves."""

    def state(self) -> dict[str, Any]:
        return {"kind": CONSTANT, "scale": self.scale}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The flag alone says what a constant scale is."""


class DynamicScale:
    """Halves when updates overflow and doubles when they have been clean for long.

    An overflow costs one of `hysteresis`; at none left the scale halves, down to `minimum`.
    `window` clean updates in a row double it and restore the hysteresis.
    """

    may_skip = True

    def __init__(self, *, initial: float, minimum: float, window: int, hysteresis: int) -> None:
        self.scale = initial
        self._minimum, self._window, self._hysteresis = minimum, window, hysteresis
        self._left, self._clean = hysteresis, 0

    def update(self, *, overflow: bool) -> None:
        if overflow:
            self._clean = 0
            self._left = max(0, self._left - 1)
            if self._left == 0:
                self.scale = max(self.scale / 2, self._minimum)
            return
        self._clean += 1
        if self._clean >= self._window:  # above it where a resumed run has a shorter one
            self._clean, self._left = 0, self._hysteresis
            self.scale *= 2

    def state(self) -> dict[str, Any]:
        return {
            "kind": DYNAMIC,
            "scale": self.scale,
            "hysteresis_left": self._left,
            "clean": self._clean,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        kept = float(state["scale"])
        if state["kind"] != DYNAMIC:
            logger.info(
                "the loss scale was constant, %g: a dynamic one starts at --initial-loss-scale %g",
                kept,
                self.scale,
            )
            return
        if kept < self._minimum:
            logger.info("the loss scale, %g, rises to --min-loss-scale %g", kept, self._minimum)
        self.scale = max(kept, self._minimum)
        self._left = min(int(state["hysteresis_left"]), self._hysteresis)
        self._clean = int(state["clean"])


def make_scaler(
    precision: str,
    *,
    constant: float,
    initial: float,
    minimum: float,
    window: int,
    hysteresis: int,
) -> LossScaler:
    """The scaler of a run: only fp16 has one that moves, unless `constant` is above 0."""
    if precision != "fp16":
        return ConstantScale(1.0, may_skip=False)
    if constant > 0:
        return ConstantScale(constant, may_skip=True)
    return DynamicScale(initial=initial, minimum=minimum, window=window, hysteresis=hysteresis)
