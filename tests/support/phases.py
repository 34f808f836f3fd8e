"""Current phase of each rank, visible to the process that forked the ranks."""

import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from tests.support.hooks import find

STARTING, RENDEZVOUS, LOADING = "starting", "rendezvous", "loading"
TRAINING, EVALUATION, SAVING, CLOSING = "training", "evaluation", "saving", "closing"
PHASES = (STARTING, RENDEZVOUS, LOADING, TRAINING, EVALUATION, SAVING, CLOSING)
WRITING_BESIDE = "training beside a write"
JOINING = (STARTING, RENDEZVOUS)
_MARKS = (  # function, phase inside, phase after (None: the phase before)
    ("training.meeting:meet", RENDEZVOUS, RENDEZVOUS),
    ("training.run:train", LOADING, CLOSING),
    ("training.trainer:Trainer.run", TRAINING, CLOSING),
    ("training.evaluation:Evaluation.run", EVALUATION, None),
    ("training.checkpointing:Saver.save", SAVING, None),
    ("training.checkpointing:Saver.finish", SAVING, None),
)
_WRITE = "checkpoint.store:CheckpointStore._write"


class Phases:
    """Shared memory with two bytes per rank: its phase, and whether a thread saves a checkpoint."""

    def __init__(self, world: int) -> None:
        self._memory = mmap.mmap(-1, 2 * world)

    def of(self, rank: int) -> str:
        phase = PHASES[self._memory[2 * rank]]
        return WRITING_BESIDE if phase == TRAINING and self._memory[2 * rank + 1] else phase

    def begin(self) -> None:
        """Resets the phases for a new start."""
        self._memory[:] = bytes(len(self._memory))

    @contextmanager
    def inside(self, place: int, value: int, after: int | None) -> Iterator[None]:
        before, self._memory[place] = self._memory[place], value
        try:
            yield
        finally:
            self._memory[place] = before if after is None else after


@dataclass(frozen=True)
class PhaseMarks:
    """Hook that makes the process of `rank` record its phase in `phases`."""

    rank: int
    phases: Phases

    def arm(self) -> None:
        for target, phase, after in _MARKS:
            back = None if after is None else PHASES.index(after)
            self._mark(target, 2 * self.rank, PHASES.index(phase), back)
        self._mark(_WRITE, 2 * self.rank + 1, 1, 0)

    def _mark(self, target: str, place: int, value: int, after: int | None) -> None:
        owner, name = find(target)
        inside = partial(self.phases.inside, place, value, after)
        setattr(owner, name, _within(inside, getattr(owner, name)))


def _within(inside: Callable[[], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        with inside():
            return function(*args, **kwargs)

    return marked
