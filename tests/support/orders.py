"""Schedules as text, in which each line lists the actions of one stage; functions parse them."""

from collections.abc import Iterator, Sequence

from pipeline_parallel.schedule.schedules import Action, Kind, Schedule

OTHER_ORDERS = [  # schedules of two stages, in orders that no --pp-mode uses
    ["F2 F1 F0 B2 B1 B0", "F2 F1 F0 B2 B1 B0"],
    ["F0 F1 F2 B2 B1 B0", "F0 F1 F2 B2 B1 B0"],
    ["F2 F0 F1 B0 B2 B1", "F2 F0 B0 F1 B2 B1"],
    ["F1 F0 I1 W1 I0 W0", "F1 I1 F0 W1 I0 W0"],
]


def actions_of(text: str) -> list[Action]:
    return [Action(Kind(word[0]), int(word[1:])) for word in text.split()]


def schedule_of(lines: Sequence[str]) -> Schedule:
    def written(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
        assert num_stages == len(lines)
        yield from actions_of(lines[stage])

    return written
