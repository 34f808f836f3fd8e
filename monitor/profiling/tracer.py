"""A tracer of a rank's work: spans of time on named tracks, cheap enough for the hot loop.

    with tracer.step(7):
        with tracer.span(Track.FORWARD_COMPUTE, microbatch=3):
            ...

Only the last steps are kept, so a run of any length needs the memory and the file of a short one.
The file is written each time that so many steps are new; a killed run leaves the last such file.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import Enum
from typing import NamedTuple, Protocol

KEEP_STEPS = 100

Clock = Callable[[], int]  # nanoseconds since an arbitrary time


class Track(str, Enum):
    """The rows of a trace; users' scripts rely on the names of the first eight.

    Under zb-h1, backward-compute is only the input gradient.
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


class StepTrace(NamedTuple):
    """The spans of one step, in the order of their ends; begin and end are as in `Span`."""

    step: int
    begin: int
    end: int
    spans: list[Span]


class Tracer(Protocol):
    """The interface of tracers. Spans outside a step are dropped."""

    @property
    def steps(self) -> Sequence[StepTrace]:
        """The last complete steps, oldest first."""

    def step(self, step: int) -> AbstractContextManager[None]:
        """Traces the block as step `step`."""

    def span(
        self, track: Track, *, microbatch: int | None = None, size: int | None = None
    ) -> AbstractContextManager[None]:
        """Traces the block as one span; `size` is a number of elements of parameters or buffers."""

    def close(self) -> None:
        """Writes the steps that are not written yet."""


class _NoSpan:
    """A block that is not traced."""

    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


NO_SPAN = _NoSpan()


class NoTracer:
    """The tracer of a run without profiling: every block is the same object, which does nothing."""

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
    """The last `keep` steps, passed to `write` after every `keep` new steps and at the end."""

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
        """Writes the steps if any are new."""
        if self._unwritten:
            self._write(self.steps)
            self._unwritten = 0


class HostTracer:
    """A tracer with the host's clock, which is right where the host does the work, as on CPUs."""

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
    """A span that adds itself to its step when it ends; it may end on any thread."""

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
