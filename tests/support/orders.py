"""Functions that parse a schedule from text, in which each line lists the actions of one stage."""

from collections.abc import Iterator, Sequence

from pipeline_parallel.schedule.schedules import Action, Kind, Schedule


def actions_of(text: str) -> list[Action]:
    return [Action(Kind(word[0]), int(word[1:])) for word in text.split()]


def schedule_of(lines: Sequence[str]) -> Schedule:
    def written(stage: int, num_stages: int, num_microbatches: int) -> Iterator[Action]:
        assert num_stages == len(lines)
        yield from actions_of(lines[stage])

    return written
