"""Trace files in the Chrome trace event format; Perfetto and chrome://tracing can open them.

The file is one JSON list, and every entry is a span (its field ph is "X"), so that scripts can
read the file easily. The field args of the first entry also contains the offset from this rank's
clock to the time since the run began, and the largest possible error of the offset.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common.files import replace_file
from monitor.profiling.clock_sync import ClockSync
from monitor.profiling.tracer import Span, StepTrace, Track

logger = logging.getLogger(__name__)

TRACE_FOLDER = Path("trace_json")

_SHORT = {Track.FORWARD_COMPUTE: "F", Track.BACKWARD_COMPUTE: "B", Track.WEIGHT_GRADIENT: "W"}


def trace_path(run: str, rank: int, *, folder: Path = TRACE_FOLDER) -> Path:
    """Returns `<folder>/<run>_rank<rank>.json`; replaces special characters of `run` by _."""
    return folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', run)}_rank{rank}.json"


def trace_events(
    steps: Iterable[StepTrace], *, rank: int, clock: ClockSync
) -> Iterator[dict[str, Any]]:
    """Yields the trace events of `steps`, step by step, in the order in which the spans begin.

    ts and dur are in µs; ts counts from the beginning of the run.
    """
    clock_args = {"clock-offset-us": clock.offset / 1000, "clock-error-us": clock.error / 1000}
    for step in steps:
        for span in sorted(step.spans, key=lambda span: span.begin):
            event = _event(span, rank=rank, clock=clock)
            event["args"] |= {"step": step.step, **clock_args}
            clock_args = {}
            yield event


class TraceFile:
    """The trace file of a rank; a failure to write the file only logs a warning."""

    def __init__(self, path: Path, *, rank: int, clock: ClockSync) -> None:
        self._path, self._rank, self._clock = path, rank, clock

    def write(self, steps: Sequence[StepTrace]) -> None:
        lines = (json.dumps(e) for e in trace_events(steps, rank=self._rank, clock=self._clock))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, ("[" + ",\n".join(lines) + "]\n").encode())
        except OSError as error:  # training continues without its trace
            logger.warning("cannot write %s: %s", self._path, error.strerror)


def _event(span: Span, *, rank: int, clock: ClockSync) -> dict[str, Any]:
    begin = clock.convert(span.begin)
    args = {"micro-batch": span.microbatch, "size": span.size}
    return {
        "name": _name(span),
        "ph": "X",
        "pid": rank,
        "tid": span.track.value,
        "ts": begin / 1000,
        "dur": (clock.convert(span.end) - begin) / 1000,
        "args": {key: value for key, value in args.items() if value is not None},
    }


def _name(span: Span) -> str:
    """Returns a name like `F3` (forward of microbatch 3), `forward-recv 3` or `optimizer-comp`."""
    name = _SHORT.get(span.track, f"{span.track.value.partition(' ')[2]} ")
    return f"{name}{'' if span.microbatch is None else span.microbatch}".rstrip()
