"""Tests CudaStream and HostStream; HostStream's thread runs calls in order and reports errors."""

import gc
import threading
import weakref
from functools import partial
from unittest.mock import Mock, patch

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
    assert first.is_done()
    assert not last.is_done(), "a call blocks the stream, not this thread"
    go.set()
    last.block_compute()
    assert last.is_done()
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
        assert point.is_done(), "all earlier calls are done"
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


def test_a_stream_waits_for_what_made_a_tensor_and_keeps_its_memory() -> None:
    """A CUDA stream waits until a tensor is computed, and keeps the tensor until its last use."""
    device, tensor = torch.device("cuda", 0), Mock(spec=torch.Tensor)
    with patch("torch.cuda.Stream") as make, patch("torch.cuda.current_stream") as current:
        torch_stream, stream = make.return_value, CudaStream(device)
        stream.wait_for_compute(tensor)
        torch_stream.wait_stream.assert_called_once_with(current.return_value)
        tensor.record_stream.assert_called_once_with(torch_stream)
        event = stream.record_event()
        event.block_compute()
        current.return_value.wait_event.assert_called_once_with(
            torch_stream.record_event.return_value
        )
        stream.close()
        torch_stream.synchronize.assert_called_once_with()
