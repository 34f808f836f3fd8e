"""What a rank does when: spans of time on named tracks, cheap enough for the hot loop.

    with tracer.step(7):
        with tracer.span(Track.FORWARD_COMPUTE, microbatch=3):
            ...

Only the last steps are kept, so that a run of any length needs the memory and the file of a short
one; a run that is killed leaves the file of the last time that so many steps were full.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import NamedTuple, Protocol

KEEP_STEPS = 100

Clock = Callable[[], int]  # nanoseconds from any moment on


class Track(str, Enum):
    """The rows of a trace: users' scripts know the first eight by these very names.

    Under zb-h1 backward-compute is the input gradient alone.
    """

    FORWARD_RECV = "1. forward-recv"
    FORWARD_COMPUTE = "2. forward-compute"
    FORWARD_SEND = "3. forward-send"
    BACKWARD_RECV = "4. backward-recv"
    BACKWARD_COMPUTE = "5. backward-compute"
    BACKWARD_SEND = "6. backward-send"
    OPTIMIZER_COMM = "7. optimizer-comm"
    OPTIMIZER_COMP = "8. optimizer-comp"
    WEIGHT_GRADIENT = "9. weight-gradient"


class Span(NamedTuple):
    """Something on a track, from begin to end in nanoseconds of the tracer's clock."""

    track: Track
    begin: int
    end: int
    microbatch: int | None = None
    size: int | None = None


class StepTrace(NamedTuple):
    """The spans of one step, in the order in which they ended; begin and end as in `Span`."""

    step: int
    begin: int
    end: int
    spans: list[Span]


class Tracer(Protocol):
    """Told of everything that takes time. Spans outside a step are dropped."""

    @property
    def steps(self) -> Sequence[StepTrace]:
        """The last steps that have ended, oldest first."""

    def step(self, step: int) -> AbstractContextManager[None]:
        """The block is step `step`."""

    def span(
        self, track: Track, *, microbatch: int | None = None, size: int | None = None
    ) -> AbstractContextManager[None]:
        """The block is one span; `size` is the number of elements of a parameter or buffer."""

    def close(self) -> None:
        """Writes what is left to write."""


class _NoSpan:
    """A block that nobody looks at."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


NO_SPAN = _NoSpan()


class NoTracer:
    """What runs have that are not profiled: every block is the same object, which does nothing."""

    __slots__ = ()

    steps: tuple[StepTrace, ...] = ()

    def step(self, step: int) -> AbstractContextManager[None]:
        return NO_SPAN

    def span(
        self, track: Track, *, microbatch: int | None = None, size: int | None = None
    ) -> AbstractContextManager[None]:
        return NO_SPAN

    def close(self) -> None: ...


NO_TRACER = NoTracer()


class StepLog:
    """The last `keep` steps, given to `write` whenever `keep` new ones are there and at the end."""

    def __init__(
        self, write: Callable[[Sequence[StepTrace]], None], *, keep: int = KEEP_STEPS
    ) -> None:
        self._write, self._keep, self._unwritten = write, keep, 0
        self.steps: deque[StepTrace] = deque(maxlen=keep)

    def append(self, step: StepTrace) -> None:
        self.steps.append(step)
        self._unwritten += 1
        if self._unwritten == self._keep:
            self.flush()

    def flush(self) -> None:
        """Writes, unless everything is written."""
        if self._unwritten:
            self._write(self.steps)
            self._unwritten = 0


class HostTracer:
    """Times blocks by the host's clock: right where the host does the work, as on CPU."""

    def __init__(self, log: StepLog, *, clock: Clock = time.perf_counter_ns) -> None:
        self._log, self._clock = log, clock
        self._spans: list[Span] | None = None

    @property
    def steps(self) -> Sequence[StepTrace]:
        return self._log.steps

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        spans: list[Span] = []
        self._spans, begin = spans, self._clock()
        try:
            yield
        finally:
            self._spans = None
            self._log.append(StepTrace(step, begin, self._clock(), spans))

    def span(
        self, track: Track, *, microbatch: int | None = None, size: int | None = None
    ) -> AbstractContextManager[None]:
        if self._spans is None:
            return NO_SPAN
        return _HostSpan(self._spans, self._clock, track, microbatch, size)

    def close(self) -> None:
        self._log.flush()


class _HostSpan:
    """Adds itself to the spans of its step when it ends; a span may end on any thread."""

    __slots__ = ("_begin", "_clock", "_microbatch", "_size", "_spans", "_track")

    def __init__(
        self,
        spans: list[Span],
        clock: Clock,
        track: Track,
        microbatch: int | None,
        size: int | None,
    ) -> None:
        self._spans, self._clock = spans, clock
        self._track, self._microbatch, self._size = track, microbatch, size

    def __enter__(self) -> None:
        self._begin = self._clock()

    def __exit__(self, *exception: object) -> None:
        end = self._clock()
        self._spans.append(Span(self._track, self._begin, end, self._microbatch, self._size))
