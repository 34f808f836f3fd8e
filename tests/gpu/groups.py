"""The checks of communicators on tensors of a device, for one or two processes on one GPU."""

import os
import sys
from collections.abc import Mapping

import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from comm.backends.base import Group
from comm.backends.cupy_nccl import NcclCommunicator
from comm.communicator import CurrentOperation, PeerLostError
from comm.topology import Topology
from tests.gpu.report import Options
from tests.gpu.worlds import Stacks, environ_of
from tests.support.backend_checks import NUMBERS, bits, check_collectives, check_pipeline, values
from tests.support.connected import enter

_TIMEOUT = 20.0  # seconds of one operation


def check_backend(rank: int, urls: Mapping[str, str], backend: str, options: Options) -> None:
    """Runs the checks of a group of two members over `backend`: as stages, then as replicas.

    `urls` has an address at which the two members meet as `stages`, and one as `replicas`.
    """
    device = _prepare(rank, options)
    for members, (num_stages, num_replicas) in {"stages": (2, 1), "replicas": (1, 2)}.items():
        entered = enter(
            rank,
            urls[members],
            num_stages=num_stages,
            num_replicas=num_replicas,
            dist_timeout=_TIMEOUT,
            dist_backend=backend,
            device=device,
        )
        if members == "stages":
            check_pipeline(entered.groups.pipeline, device)
        else:
            check_collectives(entered.groups.replicas, sums=NUMBERS, device=device)
        entered.close()


def check_alone(rank: int, options: Options) -> str:
    """Checks a sum over CuPy's NCCL in a communicator of one; returns NCCL's version."""
    device = _prepare(rank, options)
    channel = NcclCommunicator(
        Group("replicas", (0,), Topology(0, 1, 1), CurrentOperation(), _TIMEOUT),
        device=device,
        store=HashStore(),
        on_hang=_raise,
    )
    channel.connect_all()
    for dtype in NUMBERS:
        tensor = values(0, 1001, dtype).to(device)
        channel.all_reduce(tensor).wait()
        assert bits(tensor) == bits(values(0, 1001, dtype)), dtype
    channel.close()
    from cupy.cuda import nccl

    return str(nccl.get_version())


def _prepare(rank: int, options: Options) -> torch.device:
    """Sets environment variables and the current device; returns the device.

    These checks post receives before the sends that they wait for, and start kernels between. With
    CUDA's lazy loading the first start of a kernel could wait for such a receive, so all kernels
    are loaded at once here. Training must not need this, and the worlds of check 3 do without it.
    """
    os.dup2(2, 1)  # NCCL writes warnings to stdout, and the launcher shows only stderr
    Stacks(rank).arm()
    if not options.is_cuda:
        return torch.device("cpu")
    os.environ.update(environ_of(rank, options), CUDA_MODULE_LOADING="EAGER")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def _raise(error: PeerLostError) -> None:
    sys.stderr.write(f"{error}\n")
    os._exit(1)
