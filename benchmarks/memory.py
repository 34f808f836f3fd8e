"""Benchmark of memory: bytes per parameter between updates, measured and calculated.

    python benchmarks/memory.py

For every combination of precision, optimizer (adam or 8bit-adam), offload (yes or no) and ZeRO
stage (0; 1 with two replicas), one stage of a GPT-NeoX (hidden 256, 8 layers) is built and makes
one update. The measured value is the size of all tensor storages that exist after the update,
divided by the number of parameters. "device" counts the tensors on the model's device, "host" the
tensors that --use-offload moves to host memory. Without a GPU all tensors are in host memory, but
they are counted in the same way.
"""

import argparse
import gc
import os
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import GPTNeoXConfig

from comm.backends.single_process import SingleProcessCommunicator
from comm.communicator import Done, Work
from common.tensors import DTYPES
from modules.build import initialise_
from modules.registry import MODELS
from modules.stage_model import StageModel
from optimizer.build import ALGORITHMS, build_optimizer

MOMENTS = {"adam": 8.0, "8bit-adam": 2.0 + 8 / 256}  # two codes, two fp32 maxima per 256 values


class OneOfTwo(SingleProcessCommunicator):
    """Communicator of the first of two replicas; the second does not exist and is not needed."""

    @property
    def size(self) -> int:
        return 2

    def reduce(self, tensor: torch.Tensor, *, root: int) -> Work:
        return Done()

    def broadcast(self, tensor: torch.Tensor, *, root: int) -> None: ...


def build_model() -> StageModel:
    config = GPTNeoXConfig(
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=8192,
        max_position_embeddings=256,
    )
    model = StageModel(MODELS["gptneox"].load(), config, range(10), device="cpu")
    for index, module in zip(model.indices, model, strict=True):
        initialise_(module, std=0.02, seed=0, index=index)
    return model


def live_bytes() -> int:
    """Returns the bytes of all live tensors' storages; each storage is counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(precision: str, algorithm: str, *, offload: bool, sharded: bool) -> tuple[float, float]:
    """Returns the measured bytes per parameter after one update: (device, host)."""
    before = live_bytes()
    model = build_model()
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(
        model,
        ALGORITHMS[algorithm](),
        precision=precision,
        weight_decay=0.01,
        offload=offload,
        zero_stage=int(sharded),
        replicas=OneOfTwo() if sharded else SingleProcessCommunicator(),
    )
    optimizer.step(lr=0.0, factor=1.0)
    count = sum(p.numel() for p in parameters.values())
    host = 0
    if offload:
        tensors = [*optimizer.masters.values()]
        tensors += [t for moments in optimizer.moments.values() for t in moments.values()]
        host = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
        staging = 2 * 4 * max(p.numel() for p in parameters.values())
    total = live_bytes() - before - (staging if offload else 0)
    return (total - host) / count, host / count


def expected(
    precision: str, algorithm: str, *, offload: bool, sharded: bool
) -> tuple[float, float]:
    """Returns the calculated bytes per parameter: (device, host).

    The bytes are those of weights in the compute type, fp32 gradients, masters and moments.
    """
    weight = DTYPES[precision].itemsize
    kept = MOMENTS[algorithm] + (4 if weight < 4 or offload else 0)
    kept /= 2 if sharded else 1
    device = weight + 4 + (0 if offload else kept)
    return device, kept if offload else 0.0


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    print(f"processor: {processor()}; bytes per parameter, measured (arithmetic)")
    print(f"{'':24s}{'offload':>9s}{'zero':>6s}{'device':>18s}{'host':>18s}")
    for precision, algorithm, offload, sharded in product(
        DTYPES, ALGORITHMS, (False, True), (False, True)
    ):
        found = measure(precision, algorithm, offload=offload, sharded=sharded)
        right = expected(precision, algorithm, offload=offload, sharded=sharded)
        cells = "".join(f"{f:9.2f} ({r:6.2f})" for f, r in zip(found, right, strict=True))
        name = f"{precision} {algorithm}"
        print(f"{name:24s}{'yes' if offload else '':>9s}{'1' if sharded else '':>6s}{cells}")


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return "unknown"


if __name__ == "__main__":
    main()
