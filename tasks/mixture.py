"""One stream of blocks from several sources, each block drawn by the sources' weights.

Which source block n comes from depends on (seed, n) alone. Draws are stratified: among STRATUM
blocks in a row each 1/STRATUM of the unit interval is met once, in random order. Each block's
probabilities are the weights all the same, and the shares settle sooner than by independent draws.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from common.seeds import derive_seed
from tasks.packing.blocks import TokenBlock
from tasks.packing.concat import PackedSource
from tasks.source_spec import TASK_FLAG, SourceSpec
from tasks.sources.base import State
from tasks.tokenization.encoder import TrainOn

STRATUM = 64
BEFORE = {"--train-on": "all", "--pack": "concat"}  # of checkpoints that do not say

Pack = Literal["concat", "document"]


@dataclass(frozen=True)
class StreamIdentity:
    """What must be the same where a stream is restored, said as the flags say it."""

    sources: Sequence[SourceSpec]
    seq_length: int
    separator: str | None
    train_on: TrainOn
    pack: Pack
    seed: int

    def weights(self) -> list[float]:
        """The sources' weights, normalised to a sum of 1."""
        largest = max(spec.weight for spec in self.sources)  # two huge ones may sum to infinity
        total = sum(spec.weight / largest for spec in self.sources)
        return [spec.weight / largest / total for spec in self.sources]

    def flags(self) -> dict[str, str]:
        """Flag to value, weights normalised: `a:1,b:1` and `a:2,b:2` are one mixture."""
        pairs = zip(self.sources, self.weights(), strict=True)
        return {
            TASK_FLAG: ",".join(f"{spec.name}:{weight:.6g}" for spec, weight in pairs),
            "--seq-length": str(self.seq_length),
            "--doc-separator": "(none)" if self.separator is None else ascii(self.separator),
            "--train-on": self.train_on,
            "--pack": self.pack,
            "--seed": str(self.seed),
        }


@dataclass(frozen=True)
class SourceCounts:
    """How far a source has been read: documents begun, blocks made, epochs completed."""

    name: str
    documents: int
    blocks: int
    epochs: int


class BlockStream:
    """The blocks of a mixture, without end; `sources[i]` packs `identity.sources[i]`.

    `on_close` is called by `close`.
    """

    def __init__(
        self,
        sources: Sequence[PackedSource],
        identity: StreamIdentity,
        *,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._sources, self._identity = sources, identity
        self.close = on_close
        self._bounds = list(itertools.accumulate(identity.weights()))[:-1]
        self._num_blocks = 0

    def next_block(self) -> TokenBlock:
        """The next block.

        Raises:
            ValueError: The source that it is drawn from holds a bad line, or no token.
        """
        draw = _draw(self._identity.seed, self._num_blocks)
        block = self._sources[bisect.bisect_right(self._bounds, draw)].next_block()
        self._num_blocks += 1
        return block

    def weights(self) -> list[float]:
        """The sources' shares of the blocks."""
        return self._identity.weights()

    def state(self) -> State:
        """What `restore` needs to go on with the next block: serialisable as JSON."""
        return {
            "flags": self._identity.flags(),
            "num_blocks": self._num_blocks,
            "sources": [source.state() for source in self._sources],
        }

    def restore(self, state: State) -> None:
        """Goes to where `state` was taken.

        Raises:
            ValueError: The state is of another mixture, or its files changed.
        """
        for flag, value in self._identity.flags().items():
            written = state["flags"].get(flag, BEFORE.get(flag))
            if written != value:
                raise ValueError(f"{flag} {value}: the checkpoint was written with {written}")
        for source, source_state in zip(self._sources, state["sources"], strict=True):
            source.restore(source_state)
        self._num_blocks = state["num_blocks"]

    def counts(self, state: State | None = None) -> list[SourceCounts]:
        """How far each source has been read: now, or where a batch took its `state`."""
        of = (state or self.state())["sources"]
        return [
            SourceCounts(spec.name, one["num_documents"], one["num_blocks"], one["epoch"])
            for spec, one in zip(self._identity.sources, of, strict=True)
        ]


def _draw(seed: int, number: int) -> float:
    """Block `number`'s draw, in [0, 1)."""
    group, index = divmod(number, STRATUM)
    generator = random.Random(derive_seed(seed, "mixture", group))
    strata = generator.sample(range(STRATUM), STRATUM)
    places = [generator.random() for _ in range(STRATUM)]
    return (strata[index] + places[index]) / STRATUM
