"""The log lines of --measure-memory: planned memory beside the measured peak of each rank."""

import re
from collections.abc import Iterable

PLAN_WITHIN = 0.01  # the largest difference of plan and measurement, relative to the measurement
_LINE = re.compile(
    r"memory of rank \d+ .*: peak of live tensors \S+ \S+, planned \S+ \S+ \((\S+)%\); peak RSS"
)


def planned_ratios(lines: Iterable[str]) -> list[float]:
    """Returns planned / measured peak memory of each rank, from the log of rank 0."""
    found = (_LINE.search(line) for line in lines)
    return [float(match[1]) / 100 for match in found if match is not None]
