import json
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from comm.objects import gather_json
from monitor.profiling.breakdown import SimulatedSpan
from monitor.profiling.clock_sync import ClockOffset, ClockSync, clock_offset
from monitor.profiling.profiler import start_profiling
from monitor.profiling.tracer import Track
from tests.support.clocks import Alone, Wire, clock_from
from tests.support.connected import enter
from tests.support.launcher import run_ranks

SHIFT = 10**12  # nanoseconds between the clocks of two neighbouring ranks


def test_the_shortest_round_trip_counts() -> None:
    wire = Wire([(900, 100), (30, 50), (400, 400)], now=5000, ahead=-2000)
    found = clock_offset(wire, clock=wire.clock, rounds=3)
    assert found == ClockOffset(at=6040, offset=-2010, error=40)  # 10 wrong, at most 40


@pytest.mark.parametrize("there", [0, 1, 250, 499, 500])
def test_the_offset_is_right_to_its_error_however_lopsided_the_way(there: int) -> None:
    wire = Wire([(there, 500 - there)], now=77, ahead=123_456)
    found = clock_offset(wire, clock=wire.clock, rounds=1)
    assert found.error == 250
    assert abs(found.offset - 123_456) <= found.error


def test_a_world_of_one_counts_from_its_beginning() -> None:
    assert clock_offset(Alone(), clock=lambda: 9) == ClockOffset(9, 0, 0)
    clock = clock_from(1000)
    assert (clock.convert(1250), clock.error) == (250, 0)


def test_drift_is_spread_evenly_between_two_measurements() -> None:
    wire = Wire([(10, 10)] * 32, now=0, ahead=1000)
    clock = ClockSync(wire.clock)
    clock.measure(wire)
    assert clock.convert(10) == 1010
    wire.now, wire.ahead = 1_000_000, 3000
    clock.measure(wire)
    found = [clock.convert(moment) for moment in (10, 500_010, 1_000_010)]
    assert found == [1010, 502_010, 1_003_010]
    assert clock.error == 10


class Seen(NamedTuple):
    """A rank's clock offset; the time by perf_counter (`host`) and since the run began (`run`)."""

    offset: ClockOffset
    host: int
    run: int
    error: int


def find_offsets(rank: int, world_size: int, url: str, folder: Path) -> Seen:
    entered = enter(rank, url, num_stages=world_size, num_replicas=1)
    control = entered.groups.control

    def shifted() -> int:
        return time.perf_counter_ns() - rank * SHIFT

    offset = clock_offset(control, clock=shifted)
    clock = ClockSync(shifted)
    clock.measure(control)
    host = time.perf_counter_ns()
    seen = Seen(offset, host, clock.convert(host - rank * SHIFT), clock.error)

    profiler = start_profiling(control, run="job 7/x", cuda=False, folder=folder)
    for step in (1, 2, 3):
        with profiler.tracer.step(step):
            for track in (Track.FORWARD_RECV, Track.FORWARD_COMPUTE)[rank == 0 :]:
                with profiler.tracer.span(track, microbatch=0):
                    pass
    profiler.finish(
        lambda value: gather_json(control, value),
        lambda spans: [SimulatedSpan(stage, "F0", stage, stage + 1.0) for stage in range(3)],
        schedule="gpipe",
        num_stages=world_size,
        num_replicas=1,
        num_microbatches=1,
        folder=folder,
    )
    entered.close()
    return seen


def test_three_ranks_read_one_clock_and_write_their_traces(tmp_path: Path) -> None:
    ranks = run_ranks(3, find_offsets, tmp_path)
    began = ranks[0].host - ranks[0].run
    for rank, seen in enumerate(ranks):
        assert abs(seen.offset.offset - rank * SHIFT) <= seen.offset.error
        assert abs(seen.run - (seen.host - began)) <= seen.error + 1
        assert (seen.error == 0) == (rank == 0)
    names = ["job_7_x_rank0.json", "job_7_x_rank1.json", "job_7_x_rank2.json", "timeline.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    events = [json.loads((tmp_path / name).read_text()) for name in names[:3]]
    assert [len(of_rank) for of_rank in events] == [3, 6, 6]
    assert [{event["pid"] for event in of_rank} for of_rank in events] == [{0}, {1}, {2}]
