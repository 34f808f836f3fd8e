"""gloo groups in place of NCCL groups, so that comm.backends.torch_nccl runs on CPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import patch

import torch.distributed as dist


@contextmanager
def gloo_for_nccl() -> Iterator[list[tuple[int, ...]]]:
    """Replaces new NCCL groups by gloo groups; yields a list that gets each new group's ranks."""
    made: list[tuple[int, ...]] = []

    def new_group(ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
        made.append(tuple(ranks))
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=timeout)
        return group

    with patch("comm.backends.torch_nccl.new_group", new_group):
        yield made
