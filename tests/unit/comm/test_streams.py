"""Tests CudaStream and HostStream; HostStream's thread runs calls in order and reports errors."""

import gc
import threading
import weakref
from functools import partial
from unittest.mock import Mock, call, patch

import pytest
import torch

from comm.backends.streams import CudaStream, HostStream, create_stream


def test_calls_run_in_order_beside_the_computation() -> None:
    stream = HostStream()
    go, done = threading.Event(), list[int]()
    stream.submit(partial(done.append, 0))
    first = stream.record_event()
    first.block_compute()
    assert done == [0]
    stream.submit(partial(_wait, go))
    for i in (1, 2, 3):
        stream.submit(partial(done.append, i))
    last = stream.record_event()
    first.synchronize()
    assert done == [0], "a call blocks the stream, not this thread"
    go.set()
    last.synchronize()
    assert done == [0, 1, 2, 3]
    stream.submit(partial(done.append, 4))
    stream.close()
    assert done == [0, 1, 2, 3, 4], "close() waits for queued calls"


def test_two_streams_do_not_wait_for_each_other() -> None:
    one, other = create_stream(torch.device("cpu")), create_stream(torch.device("cpu"))
    go = threading.Event()
    one.submit(lambda: _wait(go))
    other.submit(go.set)
    one.record_event().block_compute()


def test_a_failure_comes_back_at_every_later_point() -> None:
    stream = HostStream()
    ran: list[int] = []
    stream.submit(partial(ran.append, 0))
    before = stream.record_event()
    stream.submit(Mock(side_effect=LookupError("the tale")))
    after = stream.record_event()
    stream.submit(partial(ran.append, 1))
    later = stream.record_event()
    for point in (after, later, after):
        with pytest.raises(LookupError, match="the tale"):
            point.block_compute()
        point.synchronize()  # returns, because all earlier calls are done
    before.block_compute()
    assert ran == [0], "no call runs after a failure"
    stream.close()


def test_a_tensor_lives_until_its_call_is_done_and_no_longer() -> None:
    stream = HostStream()
    go, tensor = threading.Event(), torch.ones(3)
    alive = weakref.ref(tensor)
    stream.submit(partial(_wait, go))
    stream.submit(partial(_use, tensor))
    del tensor
    gc.collect()
    assert alive() is not None
    go.set()
    event = stream.record_event()
    event.block_compute()
    gc.collect()
    assert alive() is None


def _use(tensor: torch.Tensor) -> None:
    assert tensor.sum() == 3


def _wait(event: threading.Event) -> None:
    assert event.wait(20.0)


def test_a_cuda_stream_waits_for_the_computation_and_has_events_to_wait_for() -> None:
    """A CUDA stream waits until tensors are computed; a thread can wait for its events.

    `torch.cuda.Event.query` holds Python's lock while it asks CUDA. When CUDA did not answer, no
    thread of Python ran any more, so nothing could report the hang. `synchronize` releases the
    lock. A blocking event lets the thread sleep in the meantime.
    """
    device = torch.device("cuda", 0)
    with (
        patch("torch.cuda.Stream") as make,
        patch("torch.cuda.Event") as make_event,
        patch("torch.cuda.current_stream") as current,
    ):
        torch_stream, stream = make.return_value, CudaStream(device)
        make.assert_called_once_with(device, priority=-1)
        stream.wait_for_compute()
        torch_stream.wait_stream.assert_called_once_with(current.return_value)
        event = stream.record_event()
        make_event.assert_called_once_with(blocking=True)
        torch_stream.record_event.assert_called_once_with(make_event.return_value)
        event.synchronize()
        assert torch_stream.record_event.return_value.mock_calls == [call.synchronize()]
        event.block_compute()
        current.return_value.wait_event.assert_called_once_with(
            torch_stream.record_event.return_value
        )
        stream.close()
        torch_stream.synchronize.assert_called_once_with()
