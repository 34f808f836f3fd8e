"""Tests that the host waits for a GPU neither in an update nor when it copies weights.

There is no GPU here. So the tests look at the operators of an update: those that copy from the host
make it wait. "meta", torch's device without memory, stands for a GPU.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from comm.backends.single_process import SingleProcessCommunicator
from data_parallel.zero_partition import ZeroPartition
from optimizer.adam import Adam, Algorithm
from optimizer.adam_8bit import Adam8bit
from optimizer.mixed_precision import MixedPrecisionWeights
from optimizer.offload import HostCopies
from optimizer.update import squared_norms
from planning.memory.fake_model import tensors_without_memory
from tests.support.gradients import make_optimizer, make_parameters

FROM_HOST = {"aten::lift_fresh", "aten::_to_copy"}  # torch.tensor and Tensor.to


class Operators(TorchDispatchMode):
    """A dispatch mode that records each operator, and types and devices of all its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, set[tuple[torch.dtype, str]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((out, args, kwargs)) if isinstance(t, Tensor)]
        self.calls.append((func._schema.name, {(t.dtype, t.device.type) for t in tensors}))
        return out

    @property
    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.calls)


def operators_of_update(algorithm: Algorithm, layers: int, dtype: torch.dtype) -> Counter[str]:
    """Returns the operators of the norms and the update of `layers` matrices and biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        shapes |= {f"{layer}.weight": (80, 60), f"{layer}.bias": (80,)}
    optimizer = make_optimizer(make_parameters(shapes), algorithm=algorithm, dtype=dtype)
    with Operators() as operators:
        squared_norms([gradient for _, gradient in optimizer.gradients.reported()])
        optimizer.step(lr=0.01, factor=0.3)
    return operators.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_many_weights_takes_no_more_calls(dtype: torch.dtype) -> None:
    """An update copied its number to the GPU once for each weight, and waited each time.

    Norms, factor and copies also took a call for each weight, so that an update of a large stage
    was more than a thousand launches.
    """
    few, many = (operators_of_update(Adam(), layers, dtype) for layers in (1, 10))
    assert few == many
    assert few["aten::_fused_adamw_"] == 2, "matrices, and biases without weight decay"
    assert FROM_HOST.isdisjoint(few - Counter({"aten::_to_copy": 1})), "norms become fp64"


def test_8bit_adam_does_not_wait_after_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' `step` synchronises after each weight; only paged memory needs this."""
    import bitsandbytes

    wait = Mock()
    monkeypatch.setattr(bitsandbytes.optim.optimizer, "sync_gpu", wait)
    counts = operators_of_update(Adam8bit(), 3, torch.bfloat16)
    assert counts["bitsandbytes::optimizer_update_8bit_blockwise"] == 3
    assert counts["bitsandbytes::optimizer_update_32bit"] == 3
    assert not wait.called
    assert FROM_HOST.isdisjoint(counts - Counter({"aten::_to_copy": 1}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_on_the_host_become_half_precision_on_the_gpu(dtype: torch.dtype) -> None:
    """A copy from host memory that also converts is converted on the host, which then waits.

    So the fp32 master is copied first, and the GPU has memory for one master at a time.
    """
    with tensors_without_memory() as live:
        parameters = {
            name: nn.Parameter(torch.empty(shape, device="meta"))
            for name, shape in {"a": (64, 32), "b": (64, 64), "c": (32,)}.items()
        }
        partition = ZeroPartition(parameters, SingleProcessCommunicator(), sharded=False)
        weights = MixedPrecisionWeights(parameters, partition, dtype=dtype, offload=True)
        live.reset_peak()
        before = live.current["meta"]
        with Operators() as operators, torch.no_grad():
            weights.refresh(list(parameters))
        staged = live.peak["meta"] - before
    copies = [places for name, places in operators.calls if "copy" in name]
    assert len(copies) >= len(parameters)
    for places in copies:
        dtypes, devices = map(set, zip(*places, strict=True))
        assert len(dtypes) == 1 or devices == {"meta"}, "a copy from the host converts"
    assert staged == (4 * 64 * 64 if dtype == torch.bfloat16 else 0)


class Stream:
    """A GPU's stream: its work is done when the host waits for an event behind it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def wait_stream(self, other: "Stream") -> None:
        self.work += other.work

    def record_event(self) -> Any:
        work = list(self.work)
        return Mock(synchronize=lambda: [run() for run in work])


@contextmanager
def gpu_streams(current: Stream, copying: HostCopies) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda device: current)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(copying, "_stream", Stream())
        yield


def test_no_master_changes_while_the_gpu_copies_it() -> None:
    """Before the host gets the first gradient, it waits for the copies of the update before."""
    current, finished = Stream(), []
    copies = HostCopies(4, torch.device("cpu"))
    current.work = [lambda: finished.append("masters of the update before")]
    with gpu_streams(current, copies):
        for gradient in copies.of([torch.ones(4), torch.ones(4)]):
            assert finished, "the caller now changes a master"
            assert gradient.tolist() == [1.0] * 4
