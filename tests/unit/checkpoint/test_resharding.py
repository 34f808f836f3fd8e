"""Tests how modules are found in the stages' files of a checkpoint, against tables made by hand."""

import pytest

from checkpoint.resume.reshard import ResumeSplit, describe_change, find_module, map_names
from pipeline_parallel.partition.split import AUTO, Asked, Split

# For each split, the modules of each stage: embedding 0, blocks 1 to 7, head 8.
HELD = {
    (7,): [[0, 1, 2, 3, 4, 5, 6, 7, 8]],
    (5, 2): [[0, 1, 2, 3, 4, 5], [6, 7, 8]],
    (3, 4): [[0, 1, 2, 3], [4, 5, 6, 7, 8]],
    (1, 3, 2, 1): [[0, 1], [2, 3, 4], [5, 6], [7, 8]],
}
# The run's split, the checkpoint's split, and for each stage of the run the stages whose files it
# needs.
SOURCES = [
    ((5, 2), (1, 3, 2, 1), [[0, 1, 2], [2, 3]]),
    ((1, 3, 2, 1), (5, 2), [[0], [0], [0, 1], [1]]),
    ((3, 4), (5, 2), [[0], [0, 1]]),
    ((5, 2), (7,), [[0], [0]]),
    ((7,), (1, 3, 2, 1), [[0, 1, 2, 3]]),
    ((5, 2), (5, 2), [[0], [1]]),
]


@pytest.mark.parametrize("split", HELD)
def test_each_module_is_found_where_it_was_saved(split: tuple[int, ...]) -> None:
    expected = [(stage, j) for stage, held in enumerate(HELD[split]) for j, _ in enumerate(held)]
    assert [find_module(index, Split(split)) for index in range(9)] == expected


@pytest.mark.parametrize(("now", "kept", "expected"), SOURCES)
def test_a_stage_needs_the_files_of_those_that_had_its_modules(
    now: tuple[int, ...], kept: tuple[int, ...], expected: list[list[int]]
) -> None:
    split = ResumeSplit(Split(now), Split(now))
    found = [split.sources(stage, Split(kept)) for stage in range(len(now))]
    assert found == expected


def test_names_are_those_of_the_stage_that_saved_them() -> None:
    """map_names maps only module 4: the saved stage has modules 2 to 4, the run's stage 4 to 8."""
    keys = {index: [f"w{index}", "bias"] for index in range(9)}
    found = map_names(range(2, 5), range(4, 9), lambda index: keys[index])
    assert found == {"0.w4": "2.w4", "0.bias": "2.bias"}
    assert map_names(range(0, 2), range(4, 9), lambda index: keys[index]) == {}


@pytest.mark.parametrize(
    ("asked", "chosen", "kept", "now"),
    [
        (AUTO, "4,3", "5,2", "5,2"),
        (AUTO, "2,3,2", "5,2", "2,3,2"),
        (Split((4, 3)), "4,3", "5,2", "4,3"),
        (4, "4,3", "1,3,2,1", "4,3"),
    ],
)
def test_auto_keeps_the_split_on_as_many_stages(
    asked: Asked, chosen: str, kept: str, now: str
) -> None:
    splits = {text: Split(map(int, text.split(","))) for text in (chosen, kept, now)}
    split = ResumeSplit(asked, splits[chosen])
    assert split.after(splits[kept]) == splits[now]
    assert split.differs_from(splits[kept]) == (kept != now)


def test_the_line_that_tells_it() -> None:
    line = describe_change(Split((2, 2, 2, 2)), Split((4, 4)))
    assert line == "the checkpoint's 4 stages of 2,2,2,2 layers become 2 of 4,4"
