"""A run of one, two or four ranks in which a user made a mistake, and its error line."""

import re
from collections.abc import Mapping
from pathlib import Path

from comm.timing import Timing
from tests.support.flags import flags_of
from tests.support.hooks import no_picture
from tests.support.launcher import free_port
from tests.support.runs import Outcome, Rank, Run
from tests.support.valid_run import LAYERS, argv, at, right, the_line

Outcomes = dict[str, Outcome]  # by run
QUICK = Timing(join_grace=1.0)
SHAPES = {1: (1, 1), 2: (1, 2), 4: (2, 2)}  # stages and replicas by world size


def on_all(flags: str) -> dict[int, str]:
    return dict.fromkeys(range(4), flags)


def folder_of(home: Path, name: str) -> Path:
    return home / "work" / name.replace(" ", "-").replace("'", "")


def start(home: Path, name: str, changes: Mapping[int, str], size: int = 1) -> Run:
    """Returns a run in a new working directory; `changes` has each rank's additional flags."""
    folder = folder_of(home, name)
    folder.mkdir(parents=True)
    stages, replicas = SHAPES[size]
    of_all = f"""
        --dist-url tcp://127.0.0.1:{free_port()} --checkpoint-path {folder}/checkpoints
        --world-size {size} --pipeline-group-size {stages} --data-group-size {replicas}
        --num-layers {2 if stages == 2 else LAYERS} --data-workers 0
    """
    ranks = []
    for rank in range(size):
        own = at(home, f"{of_all} --rank {rank} {changes.get(rank, '')}")
        given = argv(right(home) | flags_of(own))
        ranks.append(Rank(given, folder, hooks=[no_picture], timing=QUICK))
    return Run(name, ranks)


def the_same_line(outcomes: Outcome) -> str:
    """Returns the line with which every rank ends, without its `rank N:` prefixes."""
    lines = []
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 2, outcome
        line = the_line(outcome.stderr).removeprefix(f"rank {rank}: ")
        line = re.sub(r"^rank [0-9]: ", "", line)
        lines.append(re.sub(r"--model-name \S+", "--model-name", line))  # differs by rank
        assert "Traceback" not in outcome.stdout
    assert len(set(lines)) == 1, lines
    return lines[0]
