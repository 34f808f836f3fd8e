"""The CuPy/NCCL channel without a GPU: what it asks of the library, and what it says without it."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from comm import nccl_backend
from comm.activity import Activity
from comm.communicator import PeerLostError
from comm.hang_monitor import HangMonitor
from comm.lane import HostLane
from comm.nccl_backend import DTYPE_CODES, NcclCommunicator, load_library
from comm.topology import Topology

CALLS: list[tuple[object, ...]] = []


class RecordingNccl:
    """In place of cupy.cuda.nccl.NcclCommunicator: writes down what is called with what."""

    def __init__(self, size: int, unique_id: object, rank: int) -> None:
        assert unique_id == bytes(range(128, 256))
        self._name = f"{rank} of {size}"

    def check_async_error(self) -> None:
        """All is well."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: CALLS.append((self._name, name, *arguments))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("cupy.cuda.nccl")
    module.available = True  # type: ignore[attr-defined]
    module.NcclError = RuntimeError  # type: ignore[attr-defined]
    module.get_unique_id = lambda: bytes(range(128, 256))  # type: ignore[attr-defined]
    module.NcclCommunicator = RecordingNccl  # type: ignore[attr-defined]
    monkeypatch.setattr(nccl_backend, "load_library", lambda: module)
    CALLS.clear()
    return module


def middle_of_three() -> NcclCommunicator:
    """Rank 1; the ids that rank 0 and rank 2 would leave are in the store."""
    store = HashStore()
    for key in ("0-1-2", "0-1", "2-1"):
        store.set(f"nccl/pipeline/{key}", bytes(range(128, 256)).hex())
    return NcclCommunicator(
        name="pipeline",
        members=(0, 1, 2),
        topology=Topology(rank=1, num_stages=3, num_replicas=1),
        device=torch.device("cpu"),
        store=store,
        activity=Activity(),
        dist_timeout=5.0,
        on_hang=lambda error: None,
    )


def test_dtype_codes_are_those_of_nccl_h() -> None:
    expected = {
        torch.int8: 0,
        torch.uint8: 1,
        torch.bool: 1,
        torch.int32: 2,
        torch.int64: 4,
        torch.float16: 6,
        torch.float32: 7,
        torch.float64: 8,
        torch.bfloat16: 9,
    }
    assert dict(DTYPE_CODES) == expected


def test_calls(library: ModuleType) -> None:
    channel = middle_of_three()
    tensor = torch.zeros(6, dtype=torch.bfloat16)
    data = tensor.data_ptr()
    channel.send(tensor, to=2).wait()
    channel.receive(tensor, source=0).wait()
    channel.send(tensor, to=0).wait()
    channel.all_reduce(tensor)
    channel.broadcast(tensor, root=2)
    gathered = channel.all_gather(tensor)
    channel.close()
    assert gathered.shape == (3, 6)
    assert CALLS[:6] == [
        ("0 of 2", "send", data, 6, 9, 1, 0),
        ("1 of 2", "recv", data, 6, 9, 0, 0),
        ("0 of 2", "send", data, 6, 9, 1, 0),
        ("1 of 3", "allReduce", data, data, 6, 9, 0, 0),
        ("1 of 3", "broadcast", data, data, 6, 9, 2, 0),
        ("1 of 3", "allGather", data, gathered.data_ptr(), 6, 9, 0),
    ]
    assert sorted(CALLS[6:]) == [("0 of 2", "destroy")] * 2 + [("1 of 2", "destroy")] * 2 + [
        ("1 of 3", "destroy")
    ]


def test_an_error_names_the_peer(library: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR")

    monkeypatch.setattr(RecordingNccl, "send", fail, raising=False)
    message = r"pipeline send to rank 2 \(stage 2, replica 0\) failed: NCCL_ERROR_SYSTEM_ERROR"
    with pytest.raises(PeerLostError, match=message):
        middle_of_three().send(torch.zeros(1), to=2)


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(ValueError, match="pip install cupy-cuda12x nvidia-nccl-cu12"):
        load_library()


def test_a_message_that_never_ends_is_reported() -> None:
    class Never:
        def reached(self) -> bool:
            return False

        def hold_compute(self) -> None:
            """Never."""

    told: list[PeerLostError] = []
    heard = threading.Event()

    def hear(error: PeerLostError) -> None:
        told.append(error)
        heard.set()

    monitor = HangMonitor(limit=0.1, on_hang=hear)
    monitor.add("pipeline receive from rank 1", HostLane().mark(), lambda: None)
    monitor.add("pipeline receive from rank 2", Never(), lambda: None)
    assert heard.wait(5.0)
    assert str(told[0]).startswith("pipeline receive from rank 2 took more than")
