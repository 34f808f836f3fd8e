"""Tests a trace file's entries, and that the file is a complete JSON list after each write."""

import json
from pathlib import Path
from typing import Any

import pytest

from monitor.profiling.clock_sync import ClockSync
from monitor.profiling.trace_file import TraceFile, trace_events, trace_path
from monitor.profiling.tracer import HostTracer, Span, StepLog, StepTrace, Track
from tests.support.clocks import Wire, clock_from

SPANS = [
    Span(Track.FORWARD_COMPUTE, 1_500_500, 2_500_750, microbatch=0),
    Span(Track.FORWARD_RECV, 1_000_000, 1_500_000, microbatch=0),
    Span(Track.OPTIMIZER_COMP, 8_000_000, 9_000_000, size=4096),
]
STEPS = [
    StepTrace(7, 1_000_000, 9_000_000, SPANS),
    StepTrace(8, 9_000_000, 9_500_000, [Span(Track.WEIGHT_GRADIENT, 9_000_000, 9_000_001, 11)]),
]


def event(name: str, tid: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": 3, "tid": tid, "ts": ts, "dur": dur, "args": args}


FIRST = {"micro-batch": 0, "step": 7, "clock-offset-us": 0.0, "clock-error-us": 0.0}
EVENTS = [
    event("forward-recv 0", "1. forward-recv", 1000.0, 500.0, **FIRST),
    event("F0", "2. forward-compute", 1500.5, 1000.25, **{"micro-batch": 0, "step": 7}),
    event("optimizer-comp", "8. optimizer-comp", 8000.0, 1000.0, size=4096, step=7),
    event("W11", "9. weight-gradient", 9000.0, 0.001, **{"micro-batch": 11, "step": 8}),
]


def test_the_entries() -> None:
    assert list(trace_events(STEPS, rank=3, clock=clock_from(0))) == EVENTS


def test_times_are_those_of_the_run_and_the_first_entry_tells_how_well_known() -> None:
    wire = Wire([(1000, 3000)] * 16, now=0, ahead=250_000)
    clock = ClockSync(wire.clock)
    clock.measure(wire)
    first, second, *_ = trace_events(STEPS, rank=1, clock=clock)
    assert (first["ts"], first["dur"]) == (1249.0, 500.0)
    assert first["args"]["clock-offset-us"] == 249.0
    assert first["args"]["clock-error-us"] == 2.0
    assert second["args"].keys() == {"micro-batch", "step"}


@pytest.mark.parametrize(
    ("run", "name"), [("0", "0"), ("pythia-test", "pythia-test"), ("a/b c", "a_b_c")]
)
def test_the_name(run: str, name: str) -> None:
    assert trace_path(run, 2) == Path("trace_json") / f"{name}_rank2.json"


def test_the_file_is_whole_at_every_moment(tmp_path: Path) -> None:
    path = tmp_path / "new" / "0_rank0.json"
    tracer = HostTracer(StepLog(TraceFile(path, rank=0, clock=clock_from(0)).write, keep=2))
    found = []
    for step in range(1, 6):
        with tracer.step(step), tracer.span(Track.FORWARD_COMPUTE, microbatch=0):
            pass
        found.append(steps_in(path))
    tracer.close()
    assert found == [None, [1, 2], [1, 2], [3, 4], [3, 4]]
    assert steps_in(path) == [4, 5]
    assert [entry.name for entry in path.parent.iterdir()] == ["0_rank0.json"]


def steps_in(path: Path) -> list[int] | None:
    if not path.exists():
        return None
    return [event["args"]["step"] for event in json.loads(path.read_text())]


def test_no_spans_are_an_empty_list(tmp_path: Path) -> None:
    TraceFile(tmp_path / "t.json", rank=0, clock=clock_from(0)).write([])
    assert json.loads((tmp_path / "t.json").read_text()) == []


def test_a_failure_is_a_warning(tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "trace_json").write_text("not a folder")
    TraceFile(tmp_path / "trace_json" / "t.json", rank=0, clock=clock_from(0)).write(STEPS)
    assert "trace_json" in caplog.text
