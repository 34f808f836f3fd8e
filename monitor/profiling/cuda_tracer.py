"""A tracer of work on a GPU; it uses the GPU's clock, because the host only queues the work.

A span is a pair of CUDA events on the current stream. CUDA gives the time between two events as a
32-bit float of milliseconds, which is too coarse after an hour, and the GPU's clock drifts from the
host's clock. So every step has its own anchor: an event whose host time is known, because the host
waits for this event at the start of the step. Profiling adds no other wait.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from torch.cuda import Event

from monitor.profiling.tracer import Clock, Span, SpanTracer, StepLog, StepTrace, TimedSpan


class _DeviceStep(NamedTuple):
    """A step whose events are not read yet; `host_time` is the host time of event `anchor`."""

    step: int
    anchor: Event
    host_time: int
    end: Event
    spans: list[TimedSpan[Event]]

    def read(self) -> StepTrace:
        """Waits for the device to finish the step; returns it with times of the host's clock."""
        spans = [
            Span(track, self._time(begin), self._time(end), microbatch, size)
            for track, begin, end, microbatch, size in self.spans
        ]
        return StepTrace(self.step, self.host_time, self._time(self.end), spans)

    def _time(self, event: Event) -> int:
        event.synchronize()
        milliseconds: float = self.anchor.elapsed_time(event)
        return self.host_time + round(1e6 * milliseconds)


timing_event = partial(Event, enable_timing=True)


class CudaTracer(SpanTracer[Event]):
    """A tracer with CUDA events on the current stream; `steps` and `close` wait for the last step.

    A step begins when the device has finished all earlier work on the current stream. The step ends
    when the device has finished the step's work on the current stream. The events of a step are
    reused after the next step has begun.
    """

    def __init__(
        self,
        log: StepLog,
        *,
        make_event: Callable[[], Event] = timing_event,
        clock: Clock = time.perf_counter_ns,
    ) -> None:
        super().__init__(log, self.mark)
        self._make_event, self._clock = make_event, clock
        self._free: list[Event] = []
        self._unread: _DeviceStep | None = None

    @property
    def steps(self) -> Sequence[StepTrace]:
        self._read()
        return super().steps

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        anchor = self.mark()
        anchor.synchronize()
        host_time = self._clock()
        self._read()
        spans: list[TimedSpan[Event]] = []
        self._spans = spans
        try:
            yield
        finally:
            self._spans = None
            self._unread = _DeviceStep(step, anchor, host_time, self.mark(), spans)

    def close(self) -> None:
        self._read()
        super().close()

    def mark(self) -> Event:
        """Records an event on the current stream and returns it."""
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        return event

    def _read(self) -> None:
        """Converts the last step to host times and adds it to the log."""
        if self._unread is None:
            return
        step, self._unread = self._unread, None
        self._log.append(step.read())
        self._free += [step.anchor, step.end]
        self._free += [event for span in step.spans for event in span[1:3]]
