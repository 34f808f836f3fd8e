"""The factor of fp16 losses, which keeps small gradients from vanishing.

Micikevicius et al., arXiv 1710.03740. All processes have one scale: each has its own scaler and
reports the same overflows to it, so all scales change alike.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)

CONSTANT, DYNAMIC = "constant", "dynamic"  # kinds of scalers, in their states


class LossScaler(Protocol):
    """The scale of losses.

    scale: the factor of the next update's losses.
    may_skip: gradients that are not finite (an fp16 overflow) skip an update; otherwise they end
        the run.
    """

    scale: float
    may_skip: bool

    def update(self, *, overflow: bool) -> None:
        """Adapts the scale to an update that overflowed or did not."""

    def state(self) -> dict[str, Any]:
        """Returns the state for `load_state`, with the scaler's kind."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state of either kind, within the limits of the flags."""


class ConstantScale:
    """A scale that does not change."""

    def __init__(self, scale: float, *, may_skip: bool) -> None:
        self.scale, self.may_skip = scale, may_skip

    def update(self, *, overflow: bool) -> None:
        """Does nothing."""

    def state(self) -> dict[str, Any]:
        return {"kind": CONSTANT, "scale": self.scale}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the flag alone sets a constant scale."""


class DynamicScale:
    """A scale that halves after overflows and doubles after a long time without.

    Args:
        initial: the scale of the first update.
        minimum: the lowest scale.
        window: so many updates in a row without overflow double the scale, and restore the
            hysteresis.
        hysteresis: the scale halves at the overflow of this number, and at each later one.
    """

    may_skip = True

    def __init__(self, *, initial: float, minimum: float, window: int, hysteresis: int) -> None:
        self.scale = initial
        self._minimum, self._window, self._hysteresis = minimum, window, hysteresis
        self._hysteresis_left, self._clean = hysteresis, 0

    def update(self, *, overflow: bool) -> None:
        if overflow:
            self._clean = 0
            self._hysteresis_left = max(0, self._hysteresis_left - 1)
            if self._hysteresis_left == 0:
                self.scale = max(self.scale / 2, self._minimum)
            return
        self._clean += 1
        if self._clean >= self._window:  # above it where a resumed run has a shorter one
            self._clean, self._hysteresis_left = 0, self._hysteresis
            self.scale *= 2

    def state(self) -> dict[str, Any]:
        return {
            "kind": DYNAMIC,
            "scale": self.scale,
            "hysteresis_left": self._hysteresis_left,
            "clean": self._clean,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        saved = float(state["scale"])
        if state["kind"] != DYNAMIC:
            logger.info(
                "the loss scale was constant, %g: a dynamic one starts at --initial-loss-scale %g",
                saved,
                self.scale,
            )
            return
        if saved < self._minimum:
            logger.info("the loss scale, %g, rises to --min-loss-scale %g", saved, self._minimum)
        self.scale = max(saved, self._minimum)
        self._hysteresis_left = min(int(state["hysteresis_left"]), self._hysteresis)
        self._clean = int(state["clean"])


def make_scaler(
    precision: str, *, constant: float, initial: float, minimum: float, window: int, hysteresis: int
) -> LossScaler:
    """Returns the scaler of a run: fp16's is dynamic, unless `constant` is above 0."""
    if precision != "fp16":
        return ConstantScale(1.0, may_skip=False)
    if constant > 0:
        return ConstantScale(constant, may_skip=True)
    return DynamicScale(initial=initial, minimum=minimum, window=window, hysteresis=hysteresis)
