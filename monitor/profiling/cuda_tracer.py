"""Spans of work on a GPU, timed by the GPU: the host only queues it and is long gone when it runs.

A span is a pair of CUDA events on the stream that is current where it begins and ends. CUDA tells
the time between two events as a 32-bit float of milliseconds, too coarse after an hour, and its
clock drifts from the host's. So every step has an anchor of its own: an event whose host time is
known, since the host waits for it between two steps. That is the only wait that profiling adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

from monitor.profiling.tracer import NO_SPAN, Clock, Span, StepLog, StepTrace, Track


class TimingEvent(Protocol):
    """The part of torch.cuda.Event that is needed."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any) -> float: ...


class _DeviceSpan(NamedTuple):
    track: Track
    begin: TimingEvent
    end: TimingEvent
    microbatch: int | None
    size: int | None


class _DeviceStep(NamedTuple):
    """A step whose events have not been read; `anchor` happened at `host_time`."""

    step: int
    anchor: TimingEvent
    host_time: int
    end: TimingEvent
    spans: list[_DeviceSpan]

    def read(self) -> StepTrace:
        """The step in times of the host, once the device has done it."""
        spans = [
            Span(s.track, self._time(s.begin), self._time(s.end), s.microbatch, s.size)
            for s in self.spans
        ]
        return StepTrace(self.step, self.host_time, self._time(self.end), spans)

    def _time(self, event: TimingEvent) -> int:
        event.synchronize()
        return self.host_time + round(1e6 * self.anchor.elapsed_time(event))


def timing_event() -> TimingEvent:
    """A torch.cuda.Event that can tell the time."""
    import torch

    event: TimingEvent = torch.cuda.Event(enable_timing=True)
    return event


class CudaTracer:
    """Times blocks by events on the current stream; `steps` and `close` wait for the last step.

    A step begins when the device has done everything queued before it, and ends when it has done
    what was queued on the current stream in it. Events are used again, a step's after the next
    step has begun.
    """

    def __init__(
        self,
        log: StepLog,
        *,
        make_event: Callable[[], TimingEvent] = timing_event,
        clock: Clock = time.perf_counter_ns,
    ) -> None:
        self._log, self._clock = log, clock
        self._make_event = make_event
        self._free: list[TimingEvent] = []
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

    def mark(self) -> TimingEvent:
        """An event that happens when the current stream gets here."""
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        return event

    def _read(self) -> None:
        """Moves the step that ended last to the log, in times of the host."""
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
