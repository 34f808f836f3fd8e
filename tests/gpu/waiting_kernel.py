"""Kernels that wait on the GPU, as posted receives of NCCL do; they need no other process.

A posted ncclRecv is a kernel that occupies its SMs and its stream until the peer's data arrives.
Here a kernel reads a flag in pinned host memory until the flag is set. Three can set it: the host,
another kernel (the "peer"), or the waiting kernel itself after its time limit. The limit is kept by
the GPU's clock, because a call of CUDA that blocks may stop all of the host's threads: torch calls
cudaEventQuery without releasing Python's interpreter lock. So no experiment can hang for ever.
"""

from types import TracebackType
from typing import Any

import cupy
import numpy as np
import torch

_THREADS = 640  # of a block, as in NCCL's kernels
_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(640, 1)
wait_for_flag(volatile int* flag, unsigned long long nanoseconds) {
  if (threadIdx.x == 0) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    while (*flag == 0) {
      __nanosleep(500);
      asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
      if (now - begin > nanoseconds) *flag = 1;
    }
  }
  __syncthreads();
}

extern "C" __global__ void set_flag(volatile int* flag) { *flag = 1; }
"""
_WAIT: Any = cupy.RawKernel(_SOURCE, "wait_for_flag")  # compiled at its first call
_SET: Any = cupy.RawKernel(_SOURCE, "set_flag")


class WaitingKernels:
    """Kernels that wait on streams of their own, until `release` or for `seconds`.

    Each stream gets the kernel twice, because a stage posts its next receive behind the first.

    Args:
        seconds: the time limit of the kernels.
        streams: the number of streams; at most 32, because torch has 32 streams of a priority.
        blocks: the blocks of the first kernel on each stream; a block occupies an SM.
        shared_bytes: the shared memory of such a block; NCCL's kernels use some 64 KiB.
        priority: the priority of the streams; -1 is high.
    """

    def __init__(
        self,
        seconds: float,
        *,
        streams: int = 1,
        blocks: int = 1,
        shared_bytes: int = 0,
        priority: int = -1,
    ) -> None:
        self._flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.streams = [torch.cuda.Stream(priority=priority) for _ in range(streams)]
        if shared_bytes:
            _WAIT.max_dynamic_shared_size_bytes = shared_bytes
        arguments = (np.uint64(self._flag.data_ptr()), np.uint64(int(seconds * 1e9)))
        for stream in self.streams:
            stream.wait_stream(torch.cuda.current_stream())
            with cupy.cuda.ExternalStream(stream.cuda_stream):
                _WAIT((blocks,), (_THREADS,), arguments, shared_mem=shared_bytes)
                _WAIT((1,), (32,), arguments)

    def __enter__(self) -> "WaitingKernels":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Releases the kernels, and waits until the GPU has no work left."""
        self.release()
        torch.cuda.synchronize()

    @property
    def is_released(self) -> bool:
        """Whether the flag is set; this reads host memory and calls no function of CUDA."""
        return int(self._flag) != 0

    def release(self) -> None:
        """Sets the flag from the host, without a call of CUDA."""
        self._flag.fill_(1)

    def release_on(self, stream: torch.cuda.Stream) -> None:
        """Queues a kernel on `stream` that sets the flag, as a peer's send does."""
        with cupy.cuda.ExternalStream(stream.cuda_stream):
            _SET((1,), (1,), (np.uint64(self._flag.data_ptr()),))


def load_kernels() -> None:
    """Compiles and loads the kernels, so that no later measurement contains this."""
    with WaitingKernels(10.0, shared_bytes=1024) as waiting:
        waiting.release_on(torch.cuda.current_stream())
