"""The lane of host tensors: a worker beside the computation, in order, whose failures come back."""

from __future__ import annotations

import gc
import threading
import weakref
from unittest.mock import Mock, patch

import pytest
import torch

from comm.backends.streams import CudaStream, HostStream, lane_on


def test_calls_run_in_order_beside_the_computation() -> None:
    lane = HostStream()
    go, done = threading.Event(), list[int]()
    lane.queue(lambda: _append(done, 0))
    first = lane.mark()
    first.hold_compute()
    assert done == [0]
    lane.queue(lambda: _wait(go))
    for i in (1, 2, 3):
        lane.queue(lambda i=i: _append(done, i))  # type: ignore[misc]
    last = lane.mark()
    assert first.reached()
    assert not last.reached(), "the call that blocks holds the lane, and not this thread"
    go.set()
    last.hold_compute()
    assert last.reached()
    assert done == [0, 1, 2, 3]
    lane.close()


def test_two_lanes_do_not_wait_for_each_other() -> None:
    one, other = lane_on(torch.device("cpu")), lane_on(torch.device("cpu"))
    go = threading.Event()
    one.queue(lambda: _wait(go))
    other.queue(go.set)
    one.mark().hold_compute()


def test_a_failure_comes_back_at_every_later_point() -> None:
    lane = HostStream()
    ran: list[int] = []
    lane.queue(lambda: _append(ran, 0))
    before = lane.mark()
    lane.queue(lambda: _fail("the tale"))
    after = lane.mark()
    lane.queue(lambda: _append(ran, 1))
    later = lane.mark()
    for point in (after, later, after):
        with pytest.raises(LookupError, match="the tale"):
            point.hold_compute()
        assert point.reached(), "nothing before it is left to be done"
    before.hold_compute()
    assert ran == [0], "what comes after a failure is not run"
    lane.close()


def test_closing_waits_for_what_is_queued() -> None:
    lane = HostStream()
    ran: list[int] = []
    lane.queue(lambda: _append(ran, 0))
    lane.close()
    assert ran == [0]


def test_a_tensor_lives_until_its_call_is_done_and_no_longer() -> None:
    lane = HostStream()
    go, tensor = threading.Event(), torch.ones(3)
    alive = weakref.ref(tensor)
    lane.queue(lambda: _wait(go))
    lane.queue(lambda kept=tensor: _append([], int(kept.sum())))  # type: ignore[misc]
    del tensor
    gc.collect()
    assert alive() is not None
    go.set()
    mark = lane.mark()
    mark.hold_compute()
    gc.collect()
    assert alive() is None


def _append(target: list[int], value: int) -> None:
    target.append(value)


def _wait(event: threading.Event) -> None:
    assert event.wait(20.0)


def _fail(text: str) -> None:
    raise LookupError(text)


# --- streams, without a GPU ---


def test_a_stream_waits_for_what_made_a_tensor_and_keeps_its_memory() -> None:
    """Else the message would read what is not written yet, or what is written anew."""
    device, tensor = torch.device("cuda", 0), Mock(spec=torch.Tensor)
    with (
        patch("torch.cuda.Stream") as make,
        patch("torch.cuda.current_stream") as current,
    ):
        stream, lane = make.return_value, CudaStream(device)
        lane.enter(tensor)
        stream.wait_stream.assert_called_once_with(current.return_value)
        tensor.record_stream.assert_called_once_with(stream)
        mark = lane.mark()
        mark.hold_compute()
        current.return_value.wait_event.assert_called_once_with(stream.record_event.return_value)
        lane.close()
        stream.synchronize.assert_called_once_with()
