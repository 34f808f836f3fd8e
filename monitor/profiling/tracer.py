"""A tracer of a rank's work: spans of time on named tracks, with little overhead.

    with tracer.step(7):
        with tracer.span(Track.FORWARD_COMPUTE, microbatch=3):
            ...

The tracer keeps only the last KEEP_STEPS steps, so memory and the trace file stay small in a long
run. The trace file is replaced after every KEEP_STEPS steps, and at the end of the run. If a run is
killed, the file stays as it was last written.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

KEEP_STEPS = 100

Clock = Callable[[], int]  # nanoseconds since an arbitrary time
Time = TypeVar("Time")


class Track(str, Enum):
    """The tracks (rows) of a trace; users' scripts depend on the first eight names.

    With the schedule zb-h1, backward-compute is only the input gradient.
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


PIPELINE_WORK = (Track.FORWARD_COMPUTE, Track.BACKWARD_COMPUTE, Track.WEIGHT_GRADIENT)


class Span(NamedTuple):
    """An interval on a track; begin and end are nanoseconds of the tracer's clock."""

    track: Track
    begin: int
    end: int
    microbatch: int | None = None
    size: int | None = None


TimedSpan = tuple[Track, Time, Time, int | None, int | None]  # like `Span`


class StepTrace(NamedTuple):
    """One step and its spans, sorted by the end of the span; begin and end are as in `Span`."""

    step: int
    begin: int
    end: int
    spans: list[Span]


class _NoSpan:
    """A context manager that traces nothing; NO_SPAN is its only instance."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


NO_SPAN = _NoSpan()


class Tracer:
    """The interface of tracers; this class traces nothing. Tracers drop spans outside a step."""

    __slots__ = ()

    @property
    def steps(self) -> Sequence[StepTrace]:
        """The last complete steps, oldest first."""
        return ()

    def step(self, step: int) -> AbstractContextManager[None]:
        """Traces the `with` block as step `step`."""
        return NO_SPAN

    def span(
        self, track: Track, *, microbatch: int | None = None, size: int | None = None
    ) -> AbstractContextManager[None]:
        """Traces the `with` block as one span; the block works on `size` tensor elements."""
        return NO_SPAN

    def close(self) -> None:
        """Writes the steps that are not yet in the file."""


NO_TRACER = Tracer()


class StepLog:
    """A log of the last `keep` steps; it passes them to `write` after every `keep` new steps."""

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
        """Passes all kept steps to `write` if any step is new since the last write."""
        if self._unwritten:
            self._write(self.steps)
            self._unwritten = 0


class SpanTracer(Tracer, Generic[Time]):
    """A tracer that collects the spans of a step; `now` returns the current time."""

    def __init__(self, log: StepLog, now: Callable[[], Time]) -> None:
        self._log, self._now = log, now
        self._spans: list[TimedSpan[Time]] | None = None

    @property
    def steps(self) -> Sequence[StepTrace]:
        return self._log.steps

    def span(
        self, track: Track, *, microbatch: int | None = None, size: int | None = None
    ) -> AbstractContextManager[None]:
        if self._spans is None:
            return NO_SPAN
        return _OpenSpan(self._now, self._spans, track, microbatch, size)

    def close(self) -> None:
        self._log.flush()


class _OpenSpan(Generic[Time]):
    """A span that has begun; when the span ends, on any thread, it is added to the step's spans."""

    __slots__ = ("_begin", "_microbatch", "_now", "_size", "_spans", "_track")

    def __init__(
        self,
        now: Callable[[], Time],
        spans: list[TimedSpan[Time]],
        track: Track,
        microbatch: int | None,
        size: int | None,
    ) -> None:
        self._now, self._spans = now, spans
        self._track, self._microbatch, self._size = track, microbatch, size

    def __enter__(self) -> None:
        self._begin = self._now()

    def __exit__(self, *exception: object) -> None:
        end = self._now()
        self._spans.append((self._track, self._begin, end, self._microbatch, self._size))


class HostTracer(SpanTracer[int]):
    """A tracer with the host's clock, for runs on CPUs."""

    def __init__(self, log: StepLog, *, clock: Clock = time.perf_counter_ns) -> None:
        super().__init__(log, clock)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        spans: list[TimedSpan[int]] = []
        self._spans, begin = spans, self._now()
        try:
            yield
        finally:
            self._spans = None
            self._log.append(StepTrace(step, begin, self._now(), [Span(*span) for span in spans]))
