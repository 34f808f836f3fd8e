"""A mixture: one stream of blocks from several sources, drawn at random by the sources' weights.

A random number from 0 to 1 chooses the source of a block; it depends only on (seed, index of the
block). The numbers are stratified: the interval is divided into N equal parts (N is STRATUM), and
each group of N successive blocks gets one number from each part, in random order. The probability
of a source is still its weight, and the source's share of the blocks comes close to the weight
sooner than with independent numbers.
"""

import bisect
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from common.seeds import derive_seed
from tasks.packing.blocks import TokenBlock
from tasks.packing.concat import Packer
from tasks.source_spec import TASK_FLAG, SourceSpec
from tasks.sources.base import State
from tasks.tokenization.encoder import TrainOn

STRATUM = 64

Pack = Literal["concat", "document"]


@dataclass(frozen=True)
class StreamIdentity:
    """Settings that must be the same when a stream is saved and when it is restored."""

    sources: Sequence[SourceSpec]
    seq_len: int
    separator: str | None
    train_on: TrainOn
    pack: Pack
    seed: int

    def weights(self) -> list[float]:
        """Returns the sources' weights, normalised to a sum of 1."""
        largest = max(spec.weight for spec in self.sources)  # a sum of huge weights can overflow
        total = sum(spec.weight / largest for spec in self.sources)
        return [spec.weight / largest / total for spec in self.sources]

    def flags(self) -> dict[str, str]:
        """Returns the settings by flag; weights are normalised, so `a:1,b:1` equals `a:2,b:2`."""
        pairs = zip(self.sources, self.weights(), strict=True)
        return {
            TASK_FLAG: ",".join(f"{spec.name}:{weight:.6g}" for spec, weight in pairs),
            "--seq-length": str(self.seq_len),
            "--doc-separator": "(none)" if self.separator is None else ascii(self.separator),
            "--train-on": self.train_on,
            "--pack": self.pack,
            "--seed": str(self.seed),
        }


class BlockStream:
    """An endless stream of a mixture's blocks; `packers[i]` packs `identity.sources[i]`.

    close: ends the processes that the stream uses.
    """

    def __init__(
        self,
        packers: Sequence[Packer],
        identity: StreamIdentity,
        *,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._packers, self._identity = packers, identity
        self.close = close
        self._bounds = list(itertools.accumulate(identity.weights()))[:-1]
        self._num_blocks = 0

    def next_block(self) -> TokenBlock:
        """Returns the next block; raises ValueError if a source has a bad line or no token."""
        draw = _draw(self._identity.seed, self._num_blocks)
        block = self._packers[bisect.bisect_right(self._bounds, draw)].next_block()
        self._num_blocks += 1
        return block

    def weights(self) -> list[float]:
        """Returns the share of each source in the blocks; the shares sum to 1."""
        return self._identity.weights()

    def state(self) -> State:
        """Returns the state from which `restore` continues with the next block."""
        return {
            "flags": self._identity.flags(),
            "num_blocks": self._num_blocks,
            "sources": [packer.state() for packer in self._packers],
        }

    def restore(self, state: State) -> None:
        """Restores what the method `state` returned.

        Raises ValueError if the mixture or a file of a source has changed.
        """
        for flag, value in self._identity.flags().items():
            saved = state["flags"][flag]
            if saved != value:
                raise ValueError(f"{flag} {value}: the checkpoint was written with {saved}")
        for packer, packer_state in zip(self._packers, state["sources"], strict=True):
            packer.restore(packer_state)
        self._num_blocks = state["num_blocks"]


def _draw(seed: int, block: int) -> float:
    """Returns the random number, in [0, 1), that chooses the source of a block."""
    group, index = divmod(block, STRATUM)
    generator = random.Random(derive_seed(seed, "mixture", group))
    strata = generator.sample(range(STRATUM), STRATUM)
    fractions = [generator.random() for _ in range(STRATUM)]
    return (strata[index] + fractions[index]) / STRATUM
