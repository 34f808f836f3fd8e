"""A random permutation of any size that needs no memory: each position is computed on demand."""

import numpy as np
from numpy.typing import NDArray

from common.seeds import derive_seed

_ROUNDS = 8
_BLOCK = 1024  # positions that are computed at once


class Permutation:
    """A permutation of the numbers 0 to size - 1; the order depends only on `size` and `seed`.

    A Feistel network permutes the numbers below a power of four that is at least `size`. If a
    result is `size` or more, the network is applied to this result again (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002).
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        keys = [derive_seed(seed, "round", number) for number in range(_ROUNDS)]
        self._keys = np.array(keys, dtype=np.uint64)
        self._start, self._block = 0, list[int]()

    def __getitem__(self, position: int) -> int:
        """Returns the number at `position`; also computes and caches the numbers that follow."""
        if not 0 <= position - self._start < len(self._block):
            self._start = position
            self._block = self._compute(position, min(position + _BLOCK, self._size)).tolist()
        return self._block[position - self._start]

    def _compute(self, start: int, stop: int) -> NDArray[np.uint64]:
        numbers = self._permute(np.arange(start, stop, dtype=np.uint64))
        while (is_outside := numbers >= self._size).any():
            numbers[is_outside] = self._permute(numbers[is_outside])
        return numbers

    def _permute(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half, numbers & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of each value like splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
