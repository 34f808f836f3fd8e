"""The processor that runs a benchmark, and the time of one microbatch in a single process."""

import time
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.work import Workload
from comm.backends.single_process import SingleProcessCommunicator
from common.tensors import DTYPES
from data_parallel.replica_gradients import ReplicaGradients
from data_parallel.zero_partition import ZeroPartition
from modules.build import initialise_
from modules.matmul.backend import Matmul, use_matmul
from modules.matmul.cpu_info import CpuInfo
from modules.registry import MODELS
from modules.stage_model import StageModel
from pipeline_parallel.stage import Stage

WARM_UP = 3


def describe_machine() -> str:
    """Returns the processor's name and its peak matmul rates on one thread."""
    torch.set_num_threads(1)
    cpu, peaks = CpuInfo.of_this_machine(), []
    matmuls: list[Matmul] = ["default", "onednn"] if cpu.has_avx512 else ["default"]
    for matmul in matmuls:
        use_matmul(matmul)
        peaks.append(f"fp32 {peak(torch.float32):.0f} ({matmul})")
    use_matmul("default")
    halves = (name for name, dtype in DTYPES.items() if dtype != torch.float32)
    peaks += [f"{name} {peak(DTYPES[name]):.0f}" for name in halves]
    return (
        f"{cpu.name}; torch {torch.__version__}; products on one thread, "
        f"GFLOP/s: {', '.join(peaks)}"
    )


def peak(dtype: torch.dtype) -> float:
    """Returns the GFLOP/s of a matmul: 1024 x 1024 matrices in fp32, 384 x 384 in other types."""
    size = 1024 if dtype == torch.float32 else 384
    a = torch.ones(size, size, dtype=dtype)
    seconds = median(_seconds(lambda: a @ a) for _ in range(5))
    return 2 * size**3 / seconds / 1e9


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def one_process_seconds(work: Workload) -> float:
    """Returns the seconds of one microbatch's forward and backward through the complete model."""
    whole = work.on(split=(work.layers,))
    model = StageModel(
        MODELS["gptneox"].load(), whole.config, range(whole.layers + 2), device="cpu"
    )
    for index, module in zip(model.indices, model, strict=True):
        initialise_(module, std=0.02, seed=0, index=index)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[work.precision])
    parameters, alone = dict(model.named_parameters()), SingleProcessCommunicator()
    partition = ZeroPartition(parameters, alone, sharded=False)
    gradients = ReplicaGradients(parameters, partition, alone)
    stage = Stage(model, recompute=work.recompute, gradients=gradients.buffer, splits=False)
    tokens = whole.rows()[:1]

    def once() -> None:
        stage.forward(0, tokens, tokens, None, loss_scale=1e-3)
        stage.backward(0, None)

    for _ in range(WARM_UP):
        once()
    return median(_seconds(once) for _ in range(9))
