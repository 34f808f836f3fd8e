"""Scalings of rotary frequencies, for sequences longer than those of pretraining.

The formulas are those of `transformers.modeling_rope_utils`. A scaling is hashable, because tables
of rotations are cached by it (`modules.layers.rotary`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# The fields of rope_parameters for each rope_type, besides those of all types.
_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset(),
    "dynamic": frozenset(),
    "llama3": frozenset({"low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset(
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
    ),
}
_COMMON = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
}


class RopeScaling(Protocol):
    """A change of the rotary frequencies; cosines and sines are multiplied by `cos_factor`."""

    @property
    def cos_factor(self) -> float: ...

    def __hash__(self) -> int: ...

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        """Returns the changed frequencies (pairs); pair i had base^(-i / pairs)."""


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (Chen et al., arXiv 2306.15595): all frequencies are divided."""

    factor: float
    cos_factor: float = 1.0

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling (Meta, 2024): only low frequencies are divided.

    A wavelength is low, medium or high by its number of periods in `original_length` tokens. The
    division of medium wavelengths is interpolated between those of the others.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    cos_factor: float = 1.0

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        wavelengths = 2 * math.pi / frequencies
        longest, shortest = (
            self.original_length / factor
            for factor in (self.low_freq_factor, self.high_freq_factor)
        )
        smooth = (self.original_length / wavelengths - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        medium = (1 - smooth) * frequencies / self.factor + smooth * frequencies
        is_medium = (wavelengths >= shortest) & (wavelengths <= longest)
        low = torch.where(wavelengths > longest, frequencies / self.factor, frequencies)
        return torch.where(is_medium, medium, low)


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071): low frequencies are divided, high ones are not.

    In between the division is interpolated; `beta_fast` and `beta_slow` are the numbers of periods
    in `original_length` tokens at which the interpolation ends and begins.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    cos_factor: float

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        pairs = len(frequencies)
        low, high = (self._pair_of(beta, pairs, base) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        if low == high:
            high += 0.001
        places = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
        kept = 1 - ((places - low) / (high - low)).clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept

    def _pair_of(self, periods: float, pairs: int, base: float) -> float:
        """Returns the pair (not rounded) that turns `periods` times in the original length."""
        return pairs * math.log(self.original_length / (periods * 2 * math.pi)) / math.log(base)


def read_scaling(rope: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """Reads the scaling from a config's rope_parameters; returns None if nothing is scaled.

    The type "dynamic" scales only sequences longer than max_position_embeddings, and no run has
    such sequences (`arguments.config_checks`).

    Raises:
        ValueError: the type or a field is not supported, or a value is missing or no number.
    """
    kind = rope.get("rope_type", "default")
    if kind not in _FIELDS:
        raise ValueError(f"rope_type is {kind!r}, supported are {', '.join(_FIELDS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor is {rope['partial_rotary_factor']!r}: not supported"
        )
    unknown = sorted(rope.keys() - _COMMON - _FIELDS[kind])
    if unknown and kind != "default":
        raise ValueError(f"rope_parameters has {unknown[0]}, unknown to rope_type {kind}")
    if kind in ("default", "dynamic"):
        return None
    factor = _number(rope, "factor")
    if kind == "linear":
        return LinearScaling(factor)
    original = int(_number(rope, "original_max_position_embeddings", max_positions))
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        return Llama3Scaling(factor, low, high, original)
    return YarnScaling(
        factor,
        original,
        beta_fast=_number(rope, "beta_fast", 32),
        beta_slow=_number(rope, "beta_slow", 1),
        truncate=bool(rope.get("truncate", True)),
        cos_factor=_yarn_cos_factor(rope, factor),
    )


def _yarn_cos_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _number(rope: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """Returns a field of rope_parameters, or the default if the field is missing, None or 0."""
    value = rope.get(name) or default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
        raise ValueError(
            f"rope_parameters: {name} is {rope.get(name)!r}, expected a number above 0"
        )
    return float(value)
