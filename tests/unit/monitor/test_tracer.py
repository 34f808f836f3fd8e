"""Tests, with simulated clocks, that tracers record when each part of a step begins and ends."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from monitor.profiling.cuda_tracer import CudaTracer
from monitor.profiling.tracer import NO_SPAN, NO_TRACER, HostTracer, Span, StepLog, StepTrace, Track


def unwritten() -> StepLog:
    return StepLog(lambda steps: None)


def test_the_tracks_have_the_names_that_scripts_look_for() -> None:
    names = "forward-recv forward-compute forward-send backward-recv backward-compute backward-send"
    names += " optimizer-comm optimizer-comp weight-gradient"
    expected = [f"{number}. {name}" for number, name in enumerate(names.split(), 1)]
    assert [track.value for track in Track] == expected


def test_no_tracer_gives_one_object_for_every_block() -> None:
    tracer = NO_TRACER
    blocks = {
        id(tracer.span(Track.FORWARD_COMPUTE, microbatch=3)),
        id(tracer.span(Track.OPTIMIZER_COMP, size=7)),
        id(tracer.step(1)),
    }
    assert blocks == {id(NO_SPAN)}
    assert not hasattr(NO_SPAN, "__dict__")
    with tracer.step(1), tracer.span(Track.FORWARD_SEND):
        pass
    tracer.close()
    assert tracer.steps == ()


def test_no_tracer_swallows_no_error() -> None:
    with pytest.raises(KeyError), NO_TRACER.span(Track.FORWARD_SEND):
        raise KeyError


def test_host_tracer_keeps_spans_in_the_order_in_which_they_end() -> None:
    ticks = iter([100, 110, 120, 135, 140, 150, 180, 190])
    tracer = HostTracer(unwritten(), clock=ticks.__next__)
    with tracer.step(7):
        with tracer.span(Track.FORWARD_RECV, microbatch=3):
            pass
        with tracer.span(Track.OPTIMIZER_COMM), tracer.span(Track.OPTIMIZER_COMP, size=12):
            pass
    spans = [
        Span(Track.FORWARD_RECV, 110, 120, microbatch=3),
        Span(Track.OPTIMIZER_COMP, 140, 150, size=12),
        Span(Track.OPTIMIZER_COMM, 135, 180),
    ]
    assert list(tracer.steps) == [StepTrace(7, 100, 190, spans)]


def test_what_is_outside_a_step_is_dropped() -> None:
    tracer = HostTracer(unwritten())
    assert tracer.span(Track.FORWARD_COMPUTE, microbatch=0) is NO_SPAN
    with tracer.step(1):
        assert tracer.span(Track.FORWARD_COMPUTE, microbatch=0) is not NO_SPAN
    assert tracer.span(Track.FORWARD_COMPUTE, microbatch=0) is NO_SPAN


def test_a_step_that_fails_is_kept() -> None:
    tracer = HostTracer(unwritten())
    with pytest.raises(KeyError), tracer.step(4), tracer.span(Track.FORWARD_COMPUTE):
        raise KeyError
    assert [(trace.step, len(trace.spans)) for trace in tracer.steps] == [(4, 1)]


def test_the_last_steps_are_written_whenever_so_many_are_new_and_at_the_end() -> None:
    writes: list[list[int]] = []
    log = StepLog(lambda steps: writes.append([step.step for step in steps]), keep=3)
    tracer = HostTracer(log)
    for step in range(1, 8):
        with tracer.step(step):
            pass
    assert writes == [[1, 2, 3], [4, 5, 6]]
    tracer.close()
    tracer.close()
    assert writes == [[1, 2, 3], [4, 5, 6], [5, 6, 7]]


class Device:
    """A simulated GPU; each call of its clock returns the next of `ticks`, in milliseconds."""

    def __init__(self, ticks: Sequence[float]) -> None:
        self._ticks: Iterator[float] = iter(ticks)
        self.events: list[FakeEvent] = []

    def make_event(self) -> Any:
        self.events.append(FakeEvent(self))
        return self.events[-1]

    def now(self) -> float:
        return next(self._ticks)


class FakeEvent:
    def __init__(self, device: Device) -> None:
        self._device, self._time, self._waited_for = device, 0.0, False

    def record(self) -> None:
        self._time, self._waited_for = self._device.now(), False

    def synchronize(self) -> None:
        self._waited_for = True

    def elapsed_time(self, end_event: "FakeEvent") -> float:
        assert end_event._waited_for, "this event may not have happened"
        return end_event._time - self._time


def test_cuda_spans_are_told_in_host_times_anew_at_each_step() -> None:
    device = Device([50.0, 50.5, 52.0, 53.0, 90.0, 90.25, 91.0, 92.0])
    times = iter([1_000_000, 41_500_000])
    tracer = CudaTracer(unwritten(), make_event=device.make_event, clock=times.__next__)
    for step in (1, 2):
        with tracer.step(step), tracer.span(Track.FORWARD_COMPUTE, microbatch=step):
            pass
    first, second = (
        Span(Track.FORWARD_COMPUTE, start, end, number)
        for number, start, end in ((1, 1_500_000, 3_000_000), (2, 41_750_000, 42_500_000))
    )
    assert list(tracer.steps) == [
        StepTrace(1, 1_000_000, 4_000_000, [first]),
        StepTrace(2, 41_500_000, 43_500_000, [second]),
    ]


def test_cuda_events_are_used_again() -> None:
    device = Device([float(tick) for tick in range(400)])
    tracer = CudaTracer(unwritten(), make_event=device.make_event, clock=time.perf_counter_ns)
    for step in range(50):
        with tracer.step(step):
            for _ in range(3):
                with tracer.span(Track.FORWARD_COMPUTE):
                    pass
    tracer.close()
    assert len(device.events) == 9  # 8 of a step, and the next step's anchor
    assert tracer.span(Track.FORWARD_COMPUTE) is NO_SPAN
    assert len(tracer.steps) == 50
