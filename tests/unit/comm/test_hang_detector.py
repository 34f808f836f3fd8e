"""Tests the limit on messages that are queued on a device, with events that never end."""

import queue
import threading
from collections.abc import Callable
from unittest.mock import Mock, patch

import pytest
import torch

from comm.backends.hang_detector import HangDetector
from comm.backends.streams import Event
from comm.communicator import PeerLostError

CPU = torch.device("cpu")
Reports = queue.SimpleQueue[PeerLostError]


class DoubleEvent:
    """An event that ends when `ended` is set; it notes the thread that waits for it."""

    def __init__(self, *, ended: bool = False, error: Exception | None = None) -> None:
        self.ended, self._error = threading.Event(), error
        self.waits: queue.SimpleQueue[threading.Thread] = queue.SimpleQueue()
        if ended:
            self.ended.set()

    def synchronize(self) -> None:
        self.waits.put(threading.current_thread())
        if self._error is not None:
            raise self._error
        self.ended.wait()

    def block_compute(self) -> None:
        """Returns at once, as on a GPU."""


def detect(limit: float = 0.05, device: torch.device = CPU) -> tuple[HangDetector, Reports]:
    reports: Reports = queue.SimpleQueue()
    detector = HangDetector(limit=limit, on_hang=reports.put, device=device, check_seconds=0.01)
    return detector, reports


def the_report(reports: Reports) -> str:
    """Returns the text of the only report."""
    text = str(reports.get(timeout=5.0))
    with pytest.raises(queue.Empty):
        reports.get(timeout=0.1)
    return text


def returns(event: Event) -> Callable[[], Event]:
    return lambda: event


def test_a_driver_that_never_answers_is_reported_once() -> None:
    """The thread that asked CUDA also checked the limit, so --dist-timeout never ended the run.

    CUDA does not answer while another thread's first launch of a kernel waits for a queue that is
    never empty, because a receive in it waits for its peer.
    """
    detector, reports = detect(limit=0.2)
    done, first, second = DoubleEvent(ended=True), DoubleEvent(), DoubleEvent()
    detector.watch("pipeline receive from rank 1", returns(done))
    detector.watch("pipeline receive from rank 2", returns(first))
    detector.watch("pipeline send to rank 3", returns(second))
    assert the_report(reports).startswith("pipeline receive from rank 2 took more than 0 s (--dist")


def test_a_wait_that_blocks_the_host_is_reported() -> None:
    detector, reports = detect()
    block = threading.Event().wait
    threading.Thread(target=detector.watch, args=("pipeline send", block), daemon=True).start()
    assert the_report(reports).startswith("pipeline send took more than 0 s")


def test_messages_that_end_in_time_are_not_reported() -> None:
    detector, reports = detect(limit=5.0)
    event, following = DoubleEvent(), DoubleEvent(ended=True)
    detector.watch("replicas all-reduce", returns(event))
    detector.watch("replicas reduce", returns(following))
    event.ended.set()
    following.waits.get(timeout=5.0)  # the thread waits for one message after the other
    assert len(detector._pending) <= 1, "only the second may still be there"
    detector.close()
    assert reports.empty()


def test_a_wait_that_fails_in_its_own_thread_is_not_reported_as_well() -> None:
    detector, reports = detect()
    with pytest.raises(LookupError):
        detector.watch("pipeline send", Mock(side_effect=LookupError))
    with pytest.raises(queue.Empty):
        reports.get(timeout=0.15)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("CUDA error: an illegal memory access"), "CUDA error: an illegal memory ac"),
        (KeyError(8), "NCCL's result is 8 (ncclTimeout)"),
    ],
)
@pytest.mark.parametrize("asks_cuda", [True, False])
def test_a_failure_is_reported(asks_cuda: bool, error: Exception, reason: str) -> None:
    """CuPy raises KeyError for results of NCCL that it does not know; this ended the thread."""

    def check() -> None:
        if not asks_cuda:
            raise error

    detector, reports = detect(limit=60.0)
    event = DoubleEvent(error=error if asks_cuda else None)
    detector.watch("pipeline receive from rank 1", returns(event), check=check)
    text = the_report(reports)
    assert text.startswith("pipeline receive from rank 1 failed after 0."), text
    assert f" s: {reason}" in text


def test_the_thread_that_asks_cuda_uses_the_rank_s_gpu() -> None:
    """A thread begins on GPU 0. Its first call made every rank hold some 500 MB there.

    The thread with the clock calls nothing of CUDA.
    """
    event, device = DoubleEvent(), torch.device("cuda", 3)
    chosen: queue.SimpleQueue[tuple[torch.device, threading.Thread]] = queue.SimpleQueue()

    def set_device(device: torch.device) -> None:
        chosen.put((device, threading.current_thread()))

    with patch("torch.cuda.set_device", set_device):
        detector, reports = detect(device=device)
        detector.watch("pipeline receive from rank 1", returns(event))
        asking = event.waits.get(timeout=5.0)
        the_report(reports)
    assert chosen.get_nowait() == (device, asking)
    assert chosen.empty()
    assert asking is not threading.current_thread()
