"""Loss scaling: a factor of the loss in fp16 that keeps small gradients from vanishing.

Micikevicius et al., arXiv 1710.03740. Each process has its own scaler. All scalers get the same
overflows, so the scale is the same on all processes.
"""

import logging
from collections.abc import Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)

CONSTANT, DYNAMIC = "constant", "dynamic"  # kinds of scalers, in their states


class LossScaler(Protocol):
    """The scale of the losses.

    scale: the factor of the losses of the next update.
    may_skip: whether the run continues, without the update, after gradients that are not finite
        (an fp16 overflow); if False, the run ends.
    """

    scale: float
    may_skip: bool

    def update(self, *, overflow: bool) -> None:
        """Adapts the scale; `overflow` says whether gradients or losses were not finite."""

    def state(self) -> dict[str, Any]:
        """Returns the state for `load_state`, including the kind of the scaler."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores the saved state of a scaler of any kind; this scaler keeps its own settings."""


class ConstantScale:
    """A scale that does not change."""

    def __init__(self, scale: float, *, may_skip: bool) -> None:
        self.scale, self.may_skip = scale, may_skip

    def update(self, *, overflow: bool) -> None:
        """Does nothing."""

    def state(self) -> dict[str, Any]:
        return {"kind": CONSTANT, "scale": self.scale}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Does nothing, because a constant scale comes from a flag, not from a checkpoint."""


class DynamicScale:
    """A scale that halves after overflows, and doubles after many updates without an overflow.

    Args:
        initial: the scale of the first update.
        minimum: the lowest scale.
        window: after this number of updates in a row without overflow, the scale doubles, and the
            count of overflows (see `hysteresis`) returns to 0.
        hysteresis: overflows are counted. The overflow at which the count reaches this number
            halves the scale, and so does every later one; earlier ones do not change the scale.
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
        if self._clean >= self._window:  # larger if the resumed run has a shorter window
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
                "the saved loss scale was constant, %g: the dynamic loss scale starts at "
                "--initial-loss-scale %g",
                saved,
                self.scale,
            )
            return
        if saved < self._minimum:
            logger.info(
                "the saved loss scale, %g, rises to --min-loss-scale %g", saved, self._minimum
            )
        self.scale = max(saved, self._minimum)
        self._hysteresis_left = min(int(state["hysteresis_left"]), self._hysteresis)
        self._clean = int(state["clean"])


def make_scaler(
    precision: str, *, constant: float, initial: float, minimum: float, window: int, hysteresis: int
) -> LossScaler:
    """Returns the scaler of a run.

    For fp16, a value of `constant` above 0 is the scale of all updates; if `constant` is 0, the
    scale is dynamic. For other precisions the scale is always 1.
    """
    if precision != "fp16":
        return ConstantScale(1.0, may_skip=False)
    if constant > 0:
        return ConstantScale(constant, may_skip=True)
    return DynamicScale(initial=initial, minimum=minimum, window=window, hysteresis=hysteresis)
