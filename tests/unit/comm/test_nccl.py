"""Tests the CuPy/NCCL backend without a GPU; a double simulates the NCCL communicator.

Tests of the real NCCL communicator and of the CUDA streams (comm.backends.streams) need a GPU.
"""

import inspect
import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from unittest.mock import Mock

import pytest
import torch
from cupy.cuda import nccl
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from comm.backends.cupy_nccl import DTYPE_CODES, NcclCommunicator, load_library
from comm.communicator import PeerLostError
from tests.support.backend_checks import NUMBERS, check_group, check_pipeline
from tests.support.connected import enter
from tests.support.launcher import free_port, run_ranks
from tests.support.nccl_double import NcclDouble, nccl_double, open_channel

# --- every operation, and errors, between processes over the double ---


def all_checks(rank: int, world_size: int, _url: str, shapes: list[tuple[int, int, str]]) -> int:
    carried = 0
    for stages, replicas, url in shapes:
        with nccl_double() as traffic:
            entered = enter(
                rank, url, num_stages=stages, num_replicas=replicas, dist_backend="cupy_nccl"
            )
            pipeline, members = entered.groups.pipeline, entered.groups.replicas
            edges = (pipeline.rank > 0) + (pipeline.rank + 1 < pipeline.size)
            number = torch.float32.itemsize
            opened = {"send": number * edges, "allReduce": number * (members.size > 1)}
            code = DTYPE_CODES[torch.float32]
            assert traffic == Counter({(call, code): n for call, n in opened.items()})
            if pipeline.size > 1:
                assert isinstance(pipeline, NcclCommunicator)
                check_pipeline(pipeline)
            if members.size > 1:
                assert isinstance(members, NcclCommunicator)
                check_group(members, sums=NUMBERS)
                kinds = {call for call, _ in traffic}
                assert kinds == {"send", "broadcast", "allReduce", "reduce", "allGather"}
            entered.close()
        codes = {code for call, code in traffic if call == "send"}
        assert codes == {DTYPE_CODES[dtype] for dtype in (*NUMBERS, torch.bool)}
        carried += sum(traffic.values())
    return carried


def test_four_ranks_over_the_double() -> None:
    """Every operation works between four ranks, and no more than what is needed is opened.

    A pipeline opened a communicator of all its stages, and so a stream, that training never used.
    An opened communicator has carried one number: by a send on an edge, by a sum otherwise.
    """
    shapes = [(p, r, f"tcp://127.0.0.1:{free_port()}") for p, r in ((2, 2), (4, 1), (1, 4))]
    assert all(run_ranks(4, all_checks, shapes, deadline=120.0))


Ends = tuple[Callable[[NcclCommunicator], object], Callable[[NcclCommunicator], object], list[str]]
SIX, PEER = torch.zeros(6), "rank 1 (stage 1, replica 0)"


def sends(channel: NcclCommunicator) -> None:
    channel.send(SIX, to=0).wait()


def reduces(channel: NcclCommunicator) -> None:
    channel.reduce(SIX, root=0).wait()


# action of rank 1, action of rank 0, and the words of rank 0's error
MISMATCHES: dict[str, Ends] = {
    "count of a message": (
        sends,
        lambda channel: channel.receive(torch.zeros(5), source=1).wait(),
        [f"receive from {PEER}", "elements=6", "elements=5"],
    ),
    "dtype of a message": (
        sends,
        lambda channel: channel.receive(SIX.bfloat16(), source=1).wait(),
        [f"receive from {PEER}", "datatype=7", "datatype=9"],
    ),
    "count of a sum": (
        lambda channel: channel.all_reduce(SIX).wait(),
        lambda channel: channel.all_reduce(torch.zeros(5)).wait(),
        [f"all-reduce with {PEER}", "elements=6", "elements=5"],
    ),
    "dtype of a sum": (
        reduces,
        lambda channel: channel.reduce(SIX.half(), root=0).wait(),
        ["reduce to rank 0 (stage 0, replica 0) with rank 1", "datatype=7", "datatype=6"],
    ),
    "another operation": (
        lambda channel: channel.broadcast(SIX, root=1),
        lambda channel: channel.all_reduce(SIX).wait(),
        [f"all-reduce with {PEER}", "'broadcast'", "'allReduce'"],
    ),
    "another root": (
        reduces,
        lambda channel: (channel.reduce(SIX, root=1), channel.all_gather(SIX)),
        [f"all-gather with {PEER}", "call='reduce', root=0", "call='allGather', root=-1"],
    ),
    "a peer that dies": (
        lambda channel: os._exit(0),
        lambda channel: channel.receive(SIX.clone(), source=1).wait(),
        [f"receive from {PEER}", "the peer closed the connection"],
    ),
}


def mismatch_each(rank: int, world_size: int, url: str) -> None:
    host, port = url.removeprefix("tcp://").split(":")
    store = TCPStore(host, int(port), world_size, is_master=rank == 0)
    for name, (theirs, ours, words) in MISMATCHES.items():
        with nccl_double():
            channel, _ = open_channel(store, rank=rank, size=2, name=name)
            if rank == 1:
                with suppress(PeerLostError):  # a sender can end before its receiver fails
                    theirs(channel)
                continue
            with pytest.raises(PeerLostError) as caught:
                ours(channel)
            text = str(caught.value)
            assert text.startswith(f"{name} {words[0]}"), text
            assert " failed: NCCL_ERROR_" in text, text
            assert all(word in text for word in words), text
    raise AssertionError("all cases passed")


def test_what_does_not_fit_is_an_error_that_names_the_peer() -> None:
    """If rank 1's operation does not match rank 0's, or rank 1 dies, rank 0's error names rank 1.

    Rank 1 exits in the last case, so `run_ranks` always raises an error. If all cases passed, this
    error contains rank 0's text "all cases passed".
    """
    with pytest.raises(RuntimeError) as caught:
        run_ranks(2, mismatch_each)
    text = str(caught.value)
    assert "AssertionError: all cases passed" in text, text
    assert "rank 1: ended without a result, exit status 0" in text, text


# --- against the real module ---


def test_dtype_codes_are_those_of_nccl_h() -> None:
    codes = {0: "int8", 1: "uint8", 2: "int32", 4: "int64"}
    codes |= {6: "float16", 7: "float32", 8: "float64", 9: "bfloat16"}
    expected = {getattr(torch, name): code for code, name in codes.items()}
    assert dict(DTYPE_CODES) == {**expected, torch.bool: 1}


CALLS = "send recv broadcast allReduce reduce allGather destroy check_async_error"


@pytest.mark.parametrize("call", CALLS.split())
def test_the_double_is_called_as_the_real_one(call: str) -> None:
    """The double's parameters have the names that the first line of CuPy's docstring shows."""
    line = getattr(nccl.NcclCommunicator, call).__doc__.splitlines()[0]
    real = re.fullmatch(rf"NcclCommunicator\.{call}\((.*)\)", line)
    assert real is not None
    names = [parameter.split()[-1] for parameter in real[1].split(", ")]
    assert list(inspect.signature(getattr(NcclDouble, call)).parameters) == names


def test_an_old_cupy_gets_the_unique_id_as_signed_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[int, ...]] = []

    def old(ndev: int, commId: tuple[int, ...], rank: int) -> object:
        if not isinstance(commId, tuple):
            raise TypeError("Argument 'commId' has incorrect type (expected tuple, got bytes)")
        got.append(commId)
        return Mock()

    monkeypatch.setattr(nccl, "NcclCommunicator", old)
    monkeypatch.setattr(nccl, "get_unique_id", lambda: tuple(range(-64, 64)))
    open_channel(HashStore(), rank=0, size=1)
    assert got == [tuple(range(-64, 64))]


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(ValueError, match="pip install cupy-cuda12x nvidia-nccl-cu12"):
        load_library()


def test_a_cupy_without_nccl_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "available", False)
    with pytest.raises(ValueError, match="this CuPy has no NCCL"):
        load_library()
