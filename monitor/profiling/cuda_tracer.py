"""A tracer of work on a GPU with the GPU's clock, since the host only queues the work.

A span is a pair of CUDA events on the stream that is current when it begins and ends. CUDA gives
the time between two events as a 32-bit float of milliseconds, too coarse after an hour, and its
clock drifts from the host's. So every step has its own anchor: an event with a known host time,
because the host waits for it between two steps. Profiling adds no other wait.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

from torch.cuda import Event

from monitor.profiling.tracer import NO_SPAN, Clock, Span, StepLog, StepTrace, Track


class _DeviceSpan(NamedTuple):
    track: Track
    begin: Event
    end: Event
    microbatch: int | None
    size: int | None


class _DeviceStep(NamedTuple):
    """A step whose events are not read yet; `anchor` happened at `host_time`."""

    step: int
    anchor: Event
    host_time: int
    end: Event
    spans: list[_DeviceSpan]

    def read(self) -> StepTrace:
        """Returns the step in host times; waits until the device has finished it."""
        spans = [
            Span(s.track, self._time(s.begin), self._time(s.end), s.microbatch, s.size)
            for s in self.spans
        ]
        return StepTrace(self.step, self.host_time, self._time(self.end), spans)

    def _time(self, event: Event) -> int:
        event.synchronize()
        milliseconds: float = self.anchor.elapsed_time(event)
        return self.host_time + round(1e6 * milliseconds)


def timing_event() -> Event:
    """Returns a CUDA event that records its time."""
    return Event(enable_timing=True)


class CudaTracer:
    """A tracer with events on the current stream; `steps` and `close` wait for the last step.

    A step begins when the device has finished all work queued before it, and ends when it has
    finished the step's work on the current stream. A step's events are reused after the next step
    has begun.
    """

    def __init__(
        self,
        log: StepLog,
        *,
        make_event: Callable[[], Event] = timing_event,
        clock: Clock = time.perf_counter_ns,
    ) -> None:
        self._log, self._clock = log, clock
        self._make_event = make_event
        self._free: list[Event] = []
        self._unread: _DeviceStep | None = None
        self._spans: list[_DeviceSpan] | None = None

    @property
    def steps(self) -> Sequence[StepTrace]:
        self._read()
        return self._log.steps

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        anchor = self.mark()
        anchor.synchronize()
        host_time = self._clock()
        self._read()
        spans: list[_DeviceSpan] = []
        self._spans = spans
        try:
            yield
        finally:
            self._spans = None
            self._unread = _DeviceStep(step, anchor, host_time, self.mark(), spans)

    def span(
        self, track: Track, *, microbatch: int | None = None, size: int | None = None
    ) -> AbstractContextManager[None]:
        if self._spans is None:
            return NO_SPAN
        return _CudaSpan(self, self._spans, track, microbatch, size)

    def close(self) -> None:
        self._read()
        self._log.flush()

    def mark(self) -> Event:
        """Records an event on the current stream."""
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        return event

    def _read(self) -> None:
        """Moves the last step to the log, in host times."""
        if self._unread is None:
            return
        step, self._unread = self._unread, None
        self._log.append(step.read())
        self._free += [step.anchor, step.end]
        self._free += [event for span in step.spans for event in (span.begin, span.end)]


class _CudaSpan:
    __slots__ = ("_begin", "_microbatch", "_size", "_spans", "_tracer", "_track")

    def __init__(
        self,
        tracer: CudaTracer,
        spans: list[_DeviceSpan],
        track: Track,
        microbatch: int | None,
        size: int | None,
    ) -> None:
        self._tracer, self._spans = tracer, spans
        self._track, self._microbatch, self._size = track, microbatch, size

    def __enter__(self) -> None:
        self._begin = self._tracer.mark()

    def __exit__(self, *exception: object) -> None:
        end = self._tracer.mark()
        self._spans.append(_DeviceSpan(self._track, self._begin, end, self._microbatch, self._size))
