"""Shuffled orders of any length that need neither memory nor what came before."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.seeds import derive_seed

_ROUNDS = 8
_CHUNK = 1024  # positions that are looked up at once


class Permutation:
    """The numbers 0 to size - 1 in an order that `seed` alone says.

    A Feistel network over the next power of four; where it leads outside, it is followed on until
    it is back (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        keys = [derive_seed(seed, "round", number) for number in range(_ROUNDS)]
        self._keys = np.array(keys, dtype=np.uint64)
        self._start, self._found = 0, list[int]()

    def __getitem__(self, position: int) -> int:
        """Which number stands at `position`; those after it are then at hand."""
        if not 0 <= position - self._start < len(self._found):
            self._start = position
            self._found = self._look_up(position, min(position + _CHUNK, self._size)).tolist()
        return self._found[position - self._start]

    def _look_up(self, start: int, stop: int) -> NDArray[np.uint64]:
        numbers = self._walk(np.arange(start, stop, dtype=np.uint64))
        while (outside := numbers >= self._size).any():
            numbers[outside] = self._walk(numbers[outside])
        return numbers

    def _walk(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & self._mask)
        return left << self._half | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
