"""Tests the number of CPU threads of a rank, on a CPU and on a GPU with --use-offload."""

import logging
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch

from training.device import choose_device

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
CORES = 24


def threads_of(environment: dict[str, str], *, use_cuda: bool, use_offload: bool) -> list[int]:
    """Returns the calls of torch.set_num_threads by a rank, of 4 on this machine of 24 cores."""
    calls: list[int] = []
    parallel: Any = SimpleNamespace(use_cuda=use_cuda, cuda_id=1)
    with (
        patch.dict("os.environ", environment, clear=True),
        patch("os.sched_getaffinity", lambda _: set(range(CORES))),
        patch.multiple(
            "torch.cuda",
            is_available=lambda: use_cuda,
            device_count=lambda: 2,
            set_device=lambda _: None,
        ),
        patch("torch.set_num_threads", calls.append),
        patch("torch.get_num_threads", lambda: calls[-1] if calls else 3),
    ):
        device = choose_device(parallel, use_offload=use_offload, ranks_here=4)
    assert device == (torch.device("cuda", 1) if use_cuda else torch.device("cpu"))
    return calls


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, [6]),
        ({"OMP_NUM_THREADS": "1", **TORCHRUN}, [6]),
        ({"OMP_NUM_THREADS": "1"}, []),
        ({"OMP_NUM_THREADS": "2", **TORCHRUN}, []),
    ],
)
def test_offload_beside_a_gpu_shares_the_cores_unless_the_user_chose(
    environment: dict[str, str], threads: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """torchrun sets OMP_NUM_THREADS to 1, so that one thread updated all weights on the host."""
    with caplog.at_level(logging.INFO):
        assert threads_of(environment, use_cuda=True, use_offload=True) == threads
    number = threads[0] if threads else 3
    assert caplog.messages == [
        f"--use-offload: {number} CPU threads of each rank update its weights (4 ranks and 24 "
        "cores here)"
    ]


def test_without_offload_a_rank_on_a_gpu_keeps_torchs_threads() -> None:
    assert threads_of({}, use_cuda=True, use_offload=False) == []


@pytest.mark.parametrize("use_offload", [False, True])
def test_on_cpus_torchruns_single_thread_stays(use_offload: bool) -> None:
    """The number of threads changes the bits of the results of a run on CPUs."""
    options = {"use_cuda": False, "use_offload": use_offload}
    assert threads_of({}, **options) == [6]
    assert threads_of({"OMP_NUM_THREADS": "1", **TORCHRUN}, **options) == []
