"""Moments at which a rank can die, and plans, which are lists of kills at such moments."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tests.support.hooks import Kill
from tests.support.kill_lab import OTHERS, WRITERS


@dataclass(frozen=True)
class Moment:
    """A moment at which a rank dies; the plan draws the rank from `ranks`."""

    name: str
    target: str
    when: str = "before"
    ranks: Sequence[int] = (*WRITERS, *OTHERS)
    nth: int = 1
    about: str = ""
    wait: float = 0.0

    def drawn(self, draw: random.Random) -> Kill:
        rank = draw.choice(self.ranks)
        return Kill(self.name, rank, self.target, self.when, self.nth, self.about, self.wait)


IMPORT = Moment("import", "dist_clm_train:check_this_machine")  # or soon after the import
_REGISTER = "comm.rendezvous.join:_Joining._register"
_DETECTOR = "comm.liveness.failure_detector:FailureDetector"
JOINING = (
    Moment("join: the store stands", _REGISTER, ranks=(0,), wait=1.0),
    Moment("join: store reached", _REGISTER, ranks=(1, 2, 3)),
    Moment("join: arrived", _REGISTER, "after", ranks=(1, 2, 3)),
    Moment("join: all there", f"{_DETECTOR}._start_server", ranks=(0,), wait=1.0),
    Moment("join: all there", f"{_DETECTOR}._start_client", ranks=(1, 2, 3)),
    Moment("join: linked", "comm.process_groups:create_process_groups"),
    Moment("join: connected", "training.run:train"),
)
_TRAIN = "pipeline_parallel.engine:Engine.train"
FIRST = (
    Moment("evaluation before the first step", "pipeline_parallel.engine:Engine.evaluate", nth=2),
    Moment("first step", _TRAIN),
    Moment("first step: the update's second half", _TRAIN, nth=2),
)
ANY_STEP = (
    Moment("resume: before the weights", "training.initial_state:share_from_first"),
    Moment("resume: metrics cut", "monitor.metrics:MetricsFile.cut_after", "after", ranks=(0,)),
    Moment("step", _TRAIN, nth=3),
    Moment("step: updated", "optimizer.adam:Adam.step", "after"),
    Moment("evaluation", "pipeline_parallel.engine:Engine.evaluate", nth=3),
)
_FILES, PUBLISH = "checkpoint.steps.folder:write_stage_files", "checkpoint.steps.folder:publish"
SAVING = (
    Moment("save: no file yet", _FILES, ranks=WRITERS),
    Moment("save: half a file", "torch:save", "half", ranks=WRITERS, nth=2),
    Moment("save: one file", "torch:save", "after", ranks=WRITERS),
    Moment("save: all tensors", _FILES, "after", ranks=WRITERS),
    Moment("save: as a replica", "checkpoint.store:CheckpointStore._attempt", ranks=OTHERS, nth=2),
)
RENAMING = (
    Moment("save: all files", PUBLISH, ranks=WRITERS),
    Moment("save: renamed by the other", PUBLISH, ranks=(1,), wait=1.0),
    Moment("save: renamed", PUBLISH, "after", ranks=WRITERS),
    Moment("save: half of latest", "os:replace", "before", WRITERS, about=".latest."),
    Moment("save: latest", "os:replace", "after", WRITERS, about=".latest."),
    Moment("save: latest's manifest", "os:replace", "after", WRITERS, about=".latest_manifest."),
)
MOMENTS = (*JOINING, *FIRST, *ANY_STEP, *SAVING, *RENAMING)


def draw_plan(seed: int) -> list[Kill]:
    """Returns one kill at each moment, in random order; the first kills need no checkpoint."""
    draw = random.Random(seed)
    early = [IMPORT, *JOINING, *FIRST, *draw.sample(SAVING, 3)]
    middle = draw.choice(RENAMING[1:])
    late = [moment for moment in MOMENTS if moment not in early and moment is not middle]
    draw.shuffle(early)
    draw.shuffle(late)
    return [moment.drawn(draw) for moment in (*early, middle, *late)]


def draw_short_plan(seed: int) -> list[Kill]:
    """Returns kills from each group of moments, some before and some after the first checkpoint."""
    draw = random.Random(seed)
    of_first_save = SAVING[:-1]  # the omitted one needs a second save in the same start
    early = [IMPORT, draw.choice(JOINING[1:5]), draw.choice(JOINING[5:]), *draw.sample(FIRST, 2)]
    draw.shuffle(early)
    early.append(draw.choice(of_first_save))
    late = [draw.choice(ANY_STEP), draw.choice(RENAMING[2:]), draw.choice(of_first_save)]
    return [moment.drawn(draw) for moment in (*early, draw.choice(RENAMING[1:]), *late)]
