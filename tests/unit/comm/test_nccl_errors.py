"""Tests the texts of NCCL's errors: advice where NCCL's own text tells nothing."""

from unittest.mock import patch

import pytest
import torch
from cupy.cuda import nccl
from torch.distributed import HashStore  # type: ignore[attr-defined]

from comm.backends.nccl_errors import describe, free_memory
from comm.communicator import PeerLostError
from tests.support.nccl_double import NcclDouble, open_channel

CUDA_ERROR, SYSTEM_ERROR, IN_PROGRESS, TIMEOUT = 1, 2, 7, 8  # ncclResult_t of nccl.h
ADVICE = " (NCCL logs more with NCCL_DEBUG=WARN in the environment)"
OF_TORCH = """NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error \
(run with NCCL_DEBUG=INFO for details), NCCL version 2.28.9
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
Cuda failure 2 'out of memory'"""


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_DEBUG", raising=False)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (nccl.NcclError(CUDA_ERROR), "NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error"),
        (nccl.NcclError(SYSTEM_ERROR), "NCCL_ERROR_SYSTEM_ERROR: unhandled system error"),
        (KeyError(IN_PROGRESS), "NCCL's result is 7 (ncclInProgress; unset NCCL_COMM_BLOCKING)"),
        (KeyError(99), "NCCL's result is 99 (see nccl.h)"),
        (
            RuntimeError(OF_TORCH),
            "NCCL error in: /torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error, "
            "NCCL version 2.28.9: Cuda failure 2 'out of memory'",
        ),
    ],
)
def test_an_error_of_nccl_has_advice_unless_it_was_followed(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user saw "unhandled cuda error", which is true of a full GPU and of many other troubles."""
    assert describe(error) == line + ADVICE
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    assert describe(error) == line


def test_other_errors_have_no_advice() -> None:
    error = RuntimeError("[/gloo/transport/tcp/pair.cc:544] Connection closed by peer [::1]:5.\n")
    assert describe(error) == "Connection closed by peer [::1]:5"


def test_results_that_cupy_does_not_know_are_those_of_the_table() -> None:
    """CuPy itself is asked, so that a CuPy that learns them is noticed."""
    for code in (IN_PROGRESS, TIMEOUT):
        with pytest.raises(KeyError) as caught:
            nccl.NcclError(code)
        assert "nccl.h" not in describe(caught.value)


def test_an_operation_with_a_result_that_cupy_does_not_know() -> None:
    """The KeyError was a traceback of CuPy; it is the error of the operation with its peers."""

    class Failing(NcclDouble):
        def __init__(self, ndev: int, commId: bytes, rank: int) -> None:
            """Connects to nobody."""

        def send(self, *_: int) -> None:
            nccl.NcclError(TIMEOUT)

    with patch.object(nccl, "NcclCommunicator", Failing):
        channel, _ = open_channel(
            HashStore(), rank=0, size=2, connect_all=False, connect_neighbours=False
        )
        with pytest.raises(PeerLostError) as caught:
            channel.send(torch.ones(1), to=1).wait()
    operation = "pipeline send to rank 1 (stage 1, replica 0)"
    assert str(caught.value).startswith(f"{operation} failed: NCCL's result is 8 (ncclTimeout)")


def test_a_full_gpu_is_named_when_a_channel_cannot_be_opened() -> None:
    """The usual cause of "unhandled cuda error" at the start is a GPU without free memory."""

    def fail(ndev: int, commId: bytes, rank: int) -> None:
        raise nccl.NcclError(CUDA_ERROR)

    with (
        patch.object(nccl, "NcclCommunicator", fail),
        patch("torch.cuda.mem_get_info", return_value=(12_000_000, 80_000_000_000)),
        patch("torch.cuda.set_device"),
    ):
        channel, _ = open_channel(
            HashStore(), rank=0, size=2, connect_all=False, connect_neighbours=False
        )
        channel._device = torch.device("cuda", 0)
        with pytest.raises(PeerLostError) as caught:
            channel.connect_all()
    assert str(caught.value) == (
        "pipeline: no NCCL channel between rank 0 (stage 0, replica 0), rank 1 (stage 1, replica "
        f"0): NCCL_ERROR_UNHANDLED_CUDA_ERROR: unhandled cuda error{ADVICE}; 12.0 MB of the GPU's "
        "80.0 GB are free."
    )


def test_free_memory_is_told_only_where_it_can_be_the_cause() -> None:
    cuda = torch.device("cuda", 0)
    with patch("torch.cuda.mem_get_info", side_effect=RuntimeError("CUDA error: out of memory")):
        assert free_memory(nccl.NcclError(CUDA_ERROR), cuda) == ""
    with patch("torch.cuda.mem_get_info", return_value=(1, 2)):
        assert free_memory(nccl.NcclError(SYSTEM_ERROR), cuda) == ""
        assert free_memory(nccl.NcclError(CUDA_ERROR), torch.device("cpu")) == ""
