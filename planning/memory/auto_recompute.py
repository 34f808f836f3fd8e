"""--recompute auto: the fastest mode of recompute whose planned peak fits on every stage.

Each rank plans its own stage, and compares the peak with the memory of its own device. All ranks
exchange both numbers, so they choose the same mode, also if their machines differ. The results of
a run have the same bits with every mode, so each start of a run chooses anew.
"""

import logging
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from arguments.settings import Settings
from comm.objects import gather_json
from comm.run_context import RunContext
from common.text import format_bytes
from modules.layers.selective import MODES
from planning.memory.device_memory import device_memory
from planning.memory.dry_run import DryRun, PlannedModel
from planning.memory.upper_bound import upper_bound

logger = logging.getLogger(__name__)

AT_ONCE = 0.5  # a run whose upper bound is at most this share of the memory needs no dry run


class Need(NamedTuple):
    """The peak of a process of `stage`, and the bytes that its tensors may use."""

    stage: int
    peak: int
    room: int

    def __str__(self) -> str:
        return f"stage {self.stage} needs {format_bytes(self.peak)} of {format_bytes(self.room)}"


class Choice(NamedTuple):
    """A value of --recompute, the reason for it, and whether the planned peak fits."""

    value: str
    reason: str
    fits: bool = True


def fullest(needs: Sequence[Need]) -> Need:
    """Returns the need of the process that fills its device most."""
    return max(needs, key=lambda need: need.peak / max(1, need.room))


def choose_mode(needs_of: Callable[[str], Sequence[Need]]) -> Choice:
    """Returns the fastest mode that fits; if none does, the mode that needs the least memory.

    Args:
        needs_of: plans the processes with a value of --recompute; called for the fastest mode
            first, and only until a mode fits.
    """
    before = ""
    for value in MODES:
        need = fullest(needs_of(value))
        if need.peak <= need.room:
            return Choice(value, f"because {before or need}")
        before = f"{'without it' if value == 'false' else f'with {value}'} {need}"
    return Choice(value, f"which is not enough: {need}", fits=False)


def choose_recompute(settings: Settings, model: PlannedModel, context: RunContext) -> Settings:
    """Returns the settings with a mode in place of --recompute auto; every process calls it.

    Rank 0 logs the choice.
    """
    if settings.precision.recompute != "auto":
        return settings
    here = socket.gethostname()
    ranks_here = gather_json(context.control, here).count(here)
    room = device_memory(context.device, ranks_here=ranks_here)

    def gather(peak: int) -> list[Need]:
        needs = gather_json(context.control, Need(context.topology.stage, peak, room))
        return [Need(*need) for need in needs]

    def needs_of(value: str) -> list[Need]:
        planned = DryRun(settings.changed(recompute=value), model, cuda=context.is_cuda)
        return gather(planned.of_rank(context.rank).peak)

    bounds = gather(upper_bound(settings, model, context.rank))
    if all(bound.peak <= AT_ONCE * bound.room for bound in bounds):
        most = str(fullest(bounds)).replace("needs", "needs at most")
        choice = Choice("false", f"because {most}")
    else:
        choice = choose_mode(needs_of)
    if context.rank == 0:
        _log(choice)
    return settings.changed(recompute=choice.value)


def _log(choice: Choice) -> None:
    line = f"recompute: {choice.value}, {choice.reason}"
    if choice.fits:
        others = "|".join(value for value in MODES if value != choice.value)
        logger.info("%s; --recompute %s overrides", line, others)
    else:
        logger.warning("%s; --plan --device-memory SIZE lists the flags that help", line)
