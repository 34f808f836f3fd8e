"""Runs of every schedule, for tests that hold them to one process."""

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

from comm.topology import Topology
from pipeline_parallel.schedule.schedules import SCHEDULES
from tests.support.cases import Case

SCHEDULED = [(2, 1), (2, 2), (4, 1)]


def schedule_cases(own: dict[str, Any]) -> list[Case]:
    """With and without recompute, in microbatches of one row; and many buckets of gradients."""
    own = own | {"micro-batch-size": 1}
    cases = [
        Case(f"{mode}-{recompute}", own | {"pp-mode": mode, "recompute": recompute},
             shapes=SCHEDULED)
        for mode in SCHEDULES for recompute in ("true", "false")
    ]  # fmt: skip
    for zero in (0, 1):
        sharded = own | {"pp-mode": "zb-h1", "zero-stage": zero}
        cases.append(Case(f"buckets-{zero}", sharded, small_buckets, shapes=[(1, 2), (2, 2)]))
    return [*cases, Case("one-row", own, shapes=[(1, 2)])]


def small_buckets(topology: Topology) -> AbstractContextManager[object]:
    """A bucket for each large weight, where all else are in one."""
    return patch("data_parallel.grad_buffer.BUCKET_BYTES", 4096)
