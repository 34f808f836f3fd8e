"""Shuffled orders of any length that need neither memory nor what came before."""

from __future__ import annotations

from tasks.seeds import derive_seed

_ROUNDS = 8
_MASK64 = (1 << 64) - 1


class Permutation:
    """The numbers 0 to size - 1 in an order that `seed` alone says.

    A Feistel network over the next power of four; where it leads outside, it is followed on until
    it is back (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [derive_seed(seed, "round", number) for number in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """Which number stands at `position`."""
        number = self._walk(position)
        while number >= self._size:
            number = self._walk(number)
        return number

    def _walk(self, number: int) -> int:
        mask = (1 << self._half) - 1
        left, right = number >> self._half, number & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << self._half | right


def _mixed(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK64
    return value ^ value >> 31
