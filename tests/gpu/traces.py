"""Checks of the traces that --profiling tidy_profiling writes, for two stages under 1f1b.

The names of the tracks and fields are written out here, because users' scripts depend on them.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

FORWARD_RECV, FORWARD, FORWARD_SEND = "1. forward-recv", "2. forward-compute", "3. forward-send"
BACKWARD_RECV, BACKWARD, BACKWARD_SEND = (
    "4. backward-recv",
    "5. backward-compute",
    "6. backward-send",
)
OPTIMIZER = ("7. optimizer-comm", "8. optimizer-comp")
FIELDS = {"name", "ph", "pid", "tid", "ts", "dur", "args"}
# The tracks of a microbatch on the first and on the last stage.
OF_STAGE = (
    (FORWARD, FORWARD_SEND, BACKWARD_RECV, BACKWARD),
    (FORWARD_RECV, FORWARD, BACKWARD, BACKWARD_SEND),
)
# The computations of a step of four microbatches under 1f1b, on both stages.
MICROBATCHES = 4
ORDERS = ("F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3")
LETTERS = {FORWARD: "F", BACKWARD: "B"}

Event = dict[str, Any]


def trace_problems(paths: Sequence[Path], *, steps: int, slack: float) -> list[str]:
    """Returns what is wrong with the traces of both stages; empty if they are valid.

    Args:
        steps: the number of steps of the run; all of them are in the traces.
        slack: microseconds by which a message may seem to arrive too early, beside the error of
            the clocks that the traces tell.
    """
    missing = [f"{path.name} is missing" for path in paths if not path.exists()]
    if missing:
        return missing
    ranks: list[list[Event]] = [json.loads(path.read_text()) for path in paths]
    problems = [
        f"rank {rank}: {problem}"
        for rank, events in enumerate(ranks)
        for problem in _problems_of_rank(rank, events, steps)
    ]
    return problems or list(_early_messages(ranks, slack))


def _problems_of_rank(rank: int, events: Sequence[Event], steps: int) -> Iterator[str]:
    for event in events:
        if event.keys() != FIELDS or event["ph"] != "X" or event["pid"] != rank:
            yield f"not an event of this rank: {event}"
            return
        if event["ts"] < 0 or event["dur"] < 0:
            yield f"negative time: {event}"
    by_step = defaultdict(list)
    for event in sorted(events, key=lambda event: float(event["ts"])):
        by_step[event["args"]["step"]].append(event)
    if list(by_step) != list(range(1, steps + 1)):
        yield f"steps {list(by_step)}, expected 1 to {steps}"
    for step, of_step in by_step.items():
        for problem in _problems_of_step(rank, of_step):
            yield f"step {step}: {problem}"


def _problems_of_step(rank: int, events: Sequence[Event]) -> Iterator[str]:
    optimizer = [event for event in events if event["tid"] in OPTIMIZER]
    found = {
        (event["tid"], event["args"].get("micro-batch"))
        for event in events
        if event["tid"] not in OPTIMIZER
    }
    expected = {(track, i) for track in OF_STAGE[rank] for i in range(MICROBATCHES)}
    if found != expected:
        yield f"no span of {expected - found}, an unexpected span of {found - expected}"
    if {event["tid"] for event in optimizer} != set(OPTIMIZER):
        yield f"no span on one of the tracks {OPTIMIZER}"
    if any(event["args"].get("size", 0) < 1 for event in optimizer):
        yield "a span of the optimizer without a size"
    computed = [event for event in events if event["tid"] in LETTERS]
    order = " ".join(f"{LETTERS[e['tid']]}{e['args'].get('micro-batch')}" for e in computed)
    if order != ORDERS[rank]:
        yield f"computed {order}, expected {ORDERS[rank]}"
    if any(
        before["ts"] + before["dur"] > after["ts"] + 0.01 for before, after in pairwise(computed)
    ):
        yield "two computations overlap"


def _early_messages(ranks: Sequence[Sequence[Event]], slack: float) -> Iterator[str]:
    """Yields each message that arrives before it is computed, or is used before it arrives."""
    error = sum(events[0]["args"]["clock-error-us"] for events in ranks) + slack
    for source, to, compute, receive in (
        (0, 1, FORWARD, FORWARD_RECV),
        (1, 0, BACKWARD, BACKWARD_RECV),
    ):
        made, arrived = _ends(ranks[source], compute), _ends(ranks[to], receive)
        used = {_key(event): event["ts"] for event in ranks[to] if event["tid"] == compute}
        for key, end in arrived.items():
            if made[key] > end + error:
                yield f"{receive} {key} ends {made[key] - end:.0f} us before it is computed"
            if end > used[key] + slack:
                yield f"{receive} {key} ends {end - used[key]:.0f} us after it is used"


def _ends(events: Sequence[Event], track: str) -> dict[tuple[int, int], float]:
    return {_key(event): event["ts"] + event["dur"] for event in events if event["tid"] == track}


def _key(event: Event) -> tuple[int, int]:
    return event["args"]["step"], event["args"]["micro-batch"]
