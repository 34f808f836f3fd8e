"""A counter of the bytes of all live tensors, updated at each operator.

A run with --measure-memory and a dry run with fake tensors use the same counter, so their numbers
can be compared.
"""

import re
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators whose CPU kernels call torch operators: tensors of the called operators count too.
_COMPOUND = frozenset(
    f"bitsandbytes::optimizer_update_{kind}" for kind in ("8bit_blockwise", "32bit")
)


class LiveBytes(TorchDispatchMode):
    """A dispatch mode that counts the bytes of the tensors that operators take and create.

    `current` and `peak` are bytes by device type. A tensor counts from the first operator that uses
    it until its storage is freed; each storage counts once. A tensor that an operator creates and
    frees before the operator ends does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def reset_peak(self) -> None:
        """Sets `peak` to the bytes that are alive now."""
        self.peak = Counter(self.current)

    def see(self, leaves: Iterable[object]) -> None:
        """Counts the tensors among `leaves` that are not counted yet."""
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                self._count(leaf)

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
            leaf.device.type == "cpu" for leaf in tree_leaves(args) if isinstance(leaf, Tensor)
        )
        if func._schema.name in _COMPOUND and on_cpu:
            with self:
                keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
                return func.redispatch(keys, *args, **kwargs)
        return func(*args, **kwargs)

    def _count(self, tensor: Tensor) -> None:
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


def peak_resident() -> int:
    """Returns the peak resident memory of this process, in bytes; 0 on systems without procfs."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    kilobytes = re.search(r"^VmHWM:\s*(\d+)", text, re.MULTILINE)
    return int(kilobytes[1]) * 1024 if kilobytes else 0
