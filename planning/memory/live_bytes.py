"""The bytes of all tensors that are alive at once, counted operator by operator.

The same counter serves a run that measures itself and a rehearsal with tensors that hold nothing,
so that the two count alike.
"""

import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose CPU kernels are made of torch's: what these make is counted too.
_COMPOUND = frozenset(
    f"bitsandbytes::optimizer_update_{kind}" for kind in ("8bit_blockwise", "32bit")
)


class LiveBytes(TorchDispatchMode):
    """While entered, counts the storages of the tensors that operators take and make.

    `current` and `peak` are bytes by the type of device. A tensor counts from the first operator
    that meets it until its storage is freed, each storage once. What an operator makes and drops
    inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Lets `peak` begin anew from what is alive now."""
        self.peak = Counter(self.current)

    def see(self, tensors: Iterable[object]) -> None:
        """Counts tensors that no operator has met yet; what is no tensor is left out."""
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self._see(tensor)

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self.see(tree_leaves((args, kwargs)))
        out = self._call(func, args, kwargs)
        self.see(tree_leaves(out))
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        on_cpu = all(
            one.device.type == "cpu" for one in tree_leaves(args) if isinstance(one, Tensor)
        )
        if func._schema.name in _COMPOUND and on_cpu:
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(keys, *args, **kwargs)
        return func(*args, **kwargs)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size, device = storage._cdata, storage.nbytes(), tensor.device.type
        known = self._sizes.get(key)
        if known == size:
            return
        if known is None:
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key, device))
        self._sizes[key] = size
        self.current[device] += size - (known or 0)
        self.peak[device] = max(self.peak[device], self.current[device])

    def _forget(self, key: int, device: str) -> None:
        del self._storages[key]
        self.current[device] -= self._sizes.pop(key)


class CudaBytes:
    """The same of one GPU, as torch's allocator there counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def peak(self) -> Counter[str]:
        return Counter({"cuda": torch.cuda.max_memory_allocated(self._device)})

    def __enter__(self) -> "CudaBytes":
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing was set up."""


def peak_resident() -> int:
    """The most bytes of memory that this process has had at once; 0 where nothing tells."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    found = [line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else 0
