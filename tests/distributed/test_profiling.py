"""Tests --profiling tidy_profiling: it writes traces and a timeline, and changes no loss."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from comm.topology import Topology
from monitor.profiling.step_trace import RankSpan, StepOfAllRanks
from monitor.profiling.tracer import Track
from tests.support.alone import train_alone
from tests.support.cases import Case, Told, curve, meet_at, train_cases
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.launcher import run_ranks
from tests.support.models import make_shards
from tests.support.poison import BadOutput
from training.profiling import simulated_step

STAGES, REPLICAS, MICROBATCHES, STEPS, ACCUMULATE = 2, 2, 4, 4, 2
BAD_STEP = 3
FORWARD = ("1. forward-recv", "2. forward-compute", "3. forward-send")
BACKWARD = ("4. backward-recv", "5. backward-compute", "6. backward-send")
TRACKS = (*FORWARD, *BACKWARD, "7. optimizer-comm", "8. optimizer-comp", "9. weight-gradient")
LETTERS = {"2. forward-compute": "F", "5. backward-compute": "B", "9. weight-gradient": "W"}
# Order of each stage's computations in a step; under zb-h1, B of the last stage is the gradient of
# the input.
ORDERS = {
    "gpipe": ["F0 F1 F2 F3 B0 B1 B2 B3"] * 2,
    "1f1b": ["F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"],
    "zb-h1": ["F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3"],
}
ALONE = "F0 B0 F1 B1 F2 B2 F3 B3"  # 1f1b on one stage
# Messages that a stage waits for and sends: the first stage receives no activation, the last one no
# gradient.
MESSAGES = [{"3. forward-send", "4. backward-recv"}, {"1. forward-recv", "6. backward-send"}]

OfRanks = list[dict[str, Told]]  # each rank's log
PARTS = [("embs", "0"), ("1", "lm_head")]  # the files of each stage's weights

Event = dict[str, Any]


@dataclass(frozen=True)
class InFolder:
    """A hook that runs a rank in the folder `path`; if `bad`, one output of rank 1 is inf."""

    path: Path
    bad: bool = False

    @contextmanager
    def __call__(self, topology: Topology) -> Iterator[None]:
        self.path.mkdir(exist_ok=True)
        before = Path.cwd()
        os.chdir(self.path)
        with BadOutput(1, BAD_STEP, 1)(topology) if self.bad else nullcontext():
            yield
        os.chdir(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profiling")
    write_jsonl(path / "a.jsonl", make_texts(60, seed=1))
    write_jsonl(path / "held-out.jsonl", make_texts(6, seed=2))
    make_shards(path, "model", "gptneox", {"num_hidden_layers": 2})
    return path


def flags(folder: Path, schedule: str) -> dict[str, Any]:
    return flags_of(f"""
        --model-name {folder}/shards/model --model-type gptneox --num-layers 1 --embedding-dim 32
        --task-name {folder}/a.jsonl --evaluation-data {folder}/held-out.jsonl
        --evaluation-steps 2 --pp-mode {schedule} --seq-length 16 --batch-size {MICROBATCHES}
        --gradient-accumulate-step {ACCUMULATE} --total-steps {STEPS} --lr 1e-3
    """)


@pytest.fixture(scope="module")
def told(folder: Path) -> OfRanks:
    """Profiles a run of each schedule; another run is not profiled, and one fails."""
    cases = [Case("off", flags(folder, "gpipe"), InFolder(folder / "in-off"))]
    for schedule in ORDERS:
        own = flags(folder, schedule) | {"profiling": "tidy_profiling"}
        cases.append(Case(schedule, own, InFolder(folder / f"in-{schedule}")))
    stopped = flags(folder, "1f1b") | {"profiling": "tidy_profiling", "batch-size": 2}
    cases.append(Case("stopped", stopped, InFolder(folder / "in-stopped", bad=True), stops=True))
    shapes = meet_at([(STAGES, REPLICAS)])
    return run_ranks(STAGES * REPLICAS, train_cases, shapes, cases, folder, deadline=120.0)


def read_trace(folder: Path, name: str, rank: int) -> list[Event]:
    path = folder / f"in-{name}" / "trace_json" / f"{name}-{STAGES}-{REPLICAS}_rank{rank}.json"
    events: list[Event] = json.loads(path.read_text())
    return events


def by_step(events: list[Event]) -> dict[int, list[Event]]:
    """Returns a rank's trace events by step, sorted by their start times."""
    found = defaultdict(list)
    for event in sorted(events, key=lambda event: event["ts"]):
        found[event["args"]["step"]].append(event)
    return found


def num_elements(shard: Path) -> int:
    return sum(weight.numel() for weight in torch.load(shard, weights_only=True).values())


def computed(events: list[Event]) -> str:
    """Returns a rank's computations in order, in ORDERS' notation: F0 is microbatch 0's forward."""
    boxes = [event for event in events if event["tid"] in LETTERS]
    ends = [event["ts"] + event["dur"] for event in boxes]
    assert all(end <= event["ts"] for end, event in zip(ends, boxes[1:], strict=False))
    return " ".join(f"{LETTERS[event['tid']]}{event['args']['micro-batch']}" for event in boxes)


@pytest.mark.parametrize("schedule", ORDERS)
def test_profiling_changes_no_bit_and_traces_nothing_when_off(
    schedule: str, folder: Path, told: OfRanks
) -> None:
    """Profiling changes no loss, under any schedule; a run without profiling writes no traces."""
    for key in ("loss", "grad_norm"):
        profiled = curve(folder, schedule, STAGES, REPLICAS, key)
        assert profiled == curve(folder, "off", STAGES, REPLICAS, key)
        assert len(profiled) == STEPS
    assert list((folder / "in-off").iterdir()) == []


@pytest.mark.parametrize("rank", range(STAGES * REPLICAS))
@pytest.mark.parametrize("schedule", ORDERS)
def test_each_rank_computes_in_the_order_of_the_schedule_asked_for(
    schedule: str, rank: int, folder: Path, told: OfRanks
) -> None:
    steps = by_step(read_trace(folder, schedule, rank))
    assert {step: computed(events) for step, events in steps.items()} == dict.fromkeys(
        range(1, STEPS + 1), ORDERS[schedule][rank % STAGES]
    )


@pytest.mark.parametrize("rank", range(STAGES * REPLICAS))
@pytest.mark.parametrize("schedule", ORDERS)
def test_a_trace_is_as_users_scripts_expect_it(
    schedule: str, rank: int, folder: Path, told: OfRanks
) -> None:
    events = read_trace(folder, schedule, rank)
    for event in events:
        assert event.keys() == {"name", "ph", "pid", "tid", "ts", "dur", "args"}
        assert (event["ph"], event["pid"]) == ("X", rank)
        assert event["tid"] in TRACKS
        assert event["ts"] > 0
        assert event["dur"] >= 0
        args = event["args"]
        if event["tid"][0] in "78":
            assert args.keys() >= {"size", "step"}
            assert "micro-batch" not in args
        else:
            assert args["micro-batch"] in range(MICROBATCHES)
            assert "size" not in args
    messages = [event for event in events if event["tid"][0] in "1346"]
    found = {(event["tid"], event["args"]["micro-batch"]) for event in messages}
    assert found == set(product(MESSAGES[rank % STAGES], range(MICROBATCHES)))


@pytest.mark.parametrize("schedule", ORDERS)
def test_the_optimizer_is_traced_where_an_update_ends(
    schedule: str, folder: Path, told: OfRanks
) -> None:
    shards = folder / "shards" / "model"
    # Losses and tokens; each rank's stop signal and its first rank; whether a rank still writes.
    always = 2 * REPLICAS + 2 * STAGES * REPLICAS + 1
    for rank in range(STAGES * REPLICAS):
        size = sum(num_elements(shards / f"pytorch_{part}.pt") for part in PARTS[rank % STAGES])
        all_norms = 2 * 12 + 1 + 3  # of two blocks, the embedding and the head
        for step, events in by_step(read_trace(folder, schedule, rank)).items():
            of_optimizer = [event for event in events if event["tid"][0] in "78"]
            found = [(event["tid"][0], event["args"]["size"]) for event in of_optimizer]
            if step % ACCUMULATE == 0:  # only replica 0 sends the norms
                norms = size if rank < STAGES else 0
                gradients, agreement = size, always + all_norms
                assert found == [("7", gradients), ("8", norms), ("7", agreement), ("8", size)]
            else:
                assert found == [("7", always)]


@pytest.mark.parametrize("replica", range(REPLICAS))
@pytest.mark.parametrize("schedule", ORDERS)
def test_nothing_is_received_before_it_is_computed(
    schedule: str, replica: int, folder: Path, told: OfRanks
) -> None:
    """A receive ends after one stage computed the tensor and before the other stage uses it."""
    of_stage = [read_trace(folder, schedule, replica * STAGES + stage) for stage in range(STAGES)]
    off = sum(events[0]["args"]["clock-error-us"] for events in of_stage) + 0.01
    ways = [
        (0, 1, "1. forward-recv", "2. forward-compute"),
        (1, 0, "4. backward-recv", "5. backward-compute"),
    ]
    for source, to, receive, compute in ways:
        made, used, received = (
            {
                (event["args"]["step"], event["args"]["micro-batch"]): event
                for event in of_stage[stage]
                if event["tid"] == track
            }
            for stage, track in ((source, compute), (to, compute), (to, receive))
        )
        assert made.keys() == received.keys() == used.keys()
        for key, wait in received.items():
            end = wait["ts"] + wait["dur"]
            assert made[key]["ts"] + made[key]["dur"] <= end + off
            assert end <= used[key]["ts"] + 0.01


@pytest.mark.parametrize("schedule", ORDERS)
def test_the_picture_is_of_one_step_of_all_ranks(
    schedule: str, folder: Path, told: OfRanks
) -> None:
    picture = folder / f"in-{schedule}" / "trace_json" / "timeline.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    name = f"{schedule}-{STAGES}-{REPLICAS}"
    lines = [[x for x in rank[name].lines if x.startswith("profile of step")] for rank in told]
    assert lines[1:] == [[], [], []]
    ((line,), *_) = lines
    found = re.fullmatch(
        r"profile of step (\d+): ([\d.]+) ms, simulated ([\d.]+) ms; bubble ([\d.]+)%, exposed "
        r"communication ([\d.]+)%, compute ([\d.]+)%: trace_json/timeline.png",
        line,
    )
    assert found is not None, line
    step, (measured, simulated, *shares) = int(found[1]), map(float, found.groups()[1:])
    assert sum(shares) == pytest.approx(100.0, abs=0.2)
    ranks = [by_step(read_trace(folder, schedule, rank)) for rank in range(STAGES * REPLICAS)]
    events = [event for steps in ranks for event in steps[step]]
    start = min(event["ts"] for event in events)
    end = max(event["ts"] + event["dur"] for event in events)
    assert (end - start) / 1e3 <= measured + 0.1
    work = sum(event["dur"] for event in events if event["tid"][0] in "2589") / 1e3
    assert shares[2] == pytest.approx(100 * work / (len(ranks) * measured), rel=0.02, abs=0.3)
    assert simulated > 0


def test_a_run_that_stops_leaves_its_traces(folder: Path, told: OfRanks) -> None:
    for rank, of_rank in enumerate(told):
        assert of_rank[f"stopped-{STAGES}-{REPLICAS}"].stopped is not None
        steps = by_step(read_trace(folder, "stopped", rank))
        assert list(steps) == list(range(1, BAD_STEP + 1))
    assert not (folder / "in-stopped" / "trace_json" / "timeline.png").exists()


def test_a_world_of_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("monitor.recorder.draw_loss", lambda *_: None)
    own = {"num-layers": 2, "profiling": "tidy_profiling", "use-cuda": "false"}
    place = folder / "in-alone"
    place.mkdir()
    monkeypatch.chdir(place)
    train_alone(flags(folder, "1f1b") | own | {"checkpoint-path": folder / "alone"})
    events = json.loads((place / "trace_json" / "alone_rank0.json").read_text())
    orders = {step: computed(of_step) for step, of_step in by_step(events).items()}
    assert orders == dict.fromkeys(range(1, STEPS + 1), ALONE)
    assert {event["tid"][0] for event in events} == {"2", "5", "7", "8"}
    assert (place / "trace_json" / "timeline.png").is_file()


def by_hand(optimizer: list[list[tuple[float, float]]]) -> StepOfAllRanks:
    """Builds a step of 2 stages and 2 microbatches; `optimizer` has each rank's optimizer spans."""
    spans = []
    for rank, of_rank in enumerate(optimizer):
        for i in range(2):
            spans.append(RankSpan(rank, Track.FORWARD_COMPUTE, i, float(i), i + 1.0))  # 1 s
            spans.append(RankSpan(rank, Track.BACKWARD_COMPUTE, i, 5.0 + i, 7.0 + i))  # 2 s
        spans += [RankSpan(rank, Track.OPTIMIZER_COMP, None, *span) for span in of_rank]
    return StepOfAllRanks(1, 0.0, 24.0, spans)


@pytest.mark.parametrize(
    ("optimizer", "seconds"),
    [
        ([[], []], 9.0),  # stage 1 ends backward at 7, stage 0 two microbatches later
        ([[(10.0, 10.5), (11.0, 12.0)], [(10.0, 10.25), (11.0, 13.0)]], 9.5 + 2.0),
        ([[(10.0, 10.5), (15.0, 16.0)], [(10.0, 13.0), (15.0, 17.0)]], 10.0 + 2.0),
    ],
    ids=["no update", "the norms of stage 0 end last", "those of stage 1"],
)
def test_a_simulated_step_is_pipeline_norms_and_update(
    optimizer: list[list[tuple[float, float]]], seconds: float
) -> None:
    steps = [by_hand(optimizer)]
    simulated = simulated_step(steps, schedule="gpipe", num_stages=2, num_microbatches=2)
    assert simulated == pytest.approx(seconds)
