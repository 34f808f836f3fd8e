"""Random faults of test runs; a seed determines the kind, rank and moment of each fault."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.kill_lab import WORLD
from tests.support.kill_plan import ANY_STEP, FIRST, JOINING, RENAMING, SAVING, Moment

KILL, STOP, CUT, FULL, TERM = ALONE = "SIGKILL", "SIGSTOP", "cut connection", "full disk", "SIGTERM"
UNPLUGGED = "pulled wire"  # between two hosts, without any message
APART = (*ALONE, UNPLUGGED)
_LINKED = (JOINING[-1], *ANY_STEP, *SAVING, *RENAMING)  # moments with connections
_NAMED_SHARE = 0.5  # share of faults at named moments; the others are by the clock
_FOREVER_SHARE, _ROOM_SECONDS = 0.5, 0.4
_MOST_FAULTS = 3


@dataclass(frozen=True)
class Fault:
    """A fault that happens to `rank` during one start of a run.

    moment: the named moment of the fault; None: the fault happens when the fraction `share` of the
    steps that this start has to run is done.
    peer: the rank at the other end of the cut connections.
    one: whether only one of these connections is cut.
    to_all: whether every rank gets the signal SIGTERM, and not only `rank`.
    rest: seconds until a full disk has space again; None: the disk is full until the start ends.
    """

    kind: str
    rank: int
    moment: Moment | None
    share: float
    peer: int
    one: bool
    to_all: bool
    rest: float | None

    def __str__(self) -> str:
        when = f"{self.share:.0%}" if self.moment is None else f"at {self.moment.name!r}"
        return f"{self.kind} of rank {self.rank} ({when})"


@dataclass(frozen=True)
class RunPlan:
    """One run: its flags, and the faults of its first starts; later starts have no faults."""

    number: int
    changes: Mapping[str, Any]
    starts: Sequence[Sequence[Fault]]


def draw_runs(seed: int, count: int, kinds: Sequence[str] = ALONE) -> list[RunPlan]:
    """Draws runs of 1 to 3 faults; half the runs save asynchronously, a third use a data worker."""
    draw = random.Random(seed)
    deck = _shuffled_for_ever(draw, kinds)
    return [
        RunPlan(
            number,
            {
                "async-checkpoint": str(number % 2 == 1).lower(),
                "data-workers": int(number % 3 == 2),
            },
            _draw_starts(draw, deck),
        )
        for number in range(count)
    ]


def _shuffled_for_ever(draw: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Yields all kinds in random order, again and again, so that even a few runs have all kinds."""
    while True:
        yield from draw.sample(kinds, len(kinds))


def _draw_starts(draw: random.Random, deck: Iterator[str]) -> list[list[Fault]]:
    """Draws one fault per start, or sometimes two: a full disk, and then another fault."""
    starts: list[list[Fault]] = []
    for number in range(draw.randint(1, _MOST_FAULTS)):
        fault = _draw_fault(draw, next(deck), is_first=number == 0)
        # A full disk need not end the start, so another fault can follow in the same start.
        on_top = bool(starts) and starts[-1][-1].kind == FULL and fault.kind != FULL
        if on_top and draw.random() < 0.5:
            starts[-1].append(fault)
        else:
            starts.append([fault])
    return starts


def _draw_fault(draw: random.Random, kind: str, *, is_first: bool) -> Fault:
    moments = [*_LINKED] if kind in (CUT, UNPLUGGED) else [*JOINING, *_LINKED]
    moments = [*SAVING, *RENAMING] if kind == FULL else moments
    if is_first and kind != FULL:
        moments = [one for one in (*moments, *FIRST) if not one.name.startswith("resume")]
    moment = draw.choice(moments) if draw.random() < _NAMED_SHARE else None
    rank = draw.choice(range(WORLD) if moment is None else moment.ranks)
    return Fault(
        kind=kind,
        rank=rank,
        moment=moment,
        share=draw.random(),
        peer=draw.choice([other for other in range(WORLD) if other != rank]),
        one=draw.random() < 0.5,
        to_all=draw.random() < 0.5,
        rest=None if draw.random() < _FOREVER_SHARE else draw.uniform(0.0, _ROOM_SECONDS),
    )
