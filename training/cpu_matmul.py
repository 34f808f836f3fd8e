"""The choice of the fp32 matmul library on CPUs; the log and the checkpoints name the library.

Each rank chooses the library for its own CPU, before its first matmul. The exact results of a run
depend on the library. So on resume, a rank uses the library that the checkpoint names, unless
--cpu-matmul names another one.
"""

import logging
from collections.abc import Sequence

from comm.communicator import Communicator
from comm.objects import gather_json
from common.tensors import DTYPES
from modules.matmul.backend import Matmul
from modules.matmul.cpu_info import CpuInfo
from modules.matmul.select import saved_choice, select_matmul

logger = logging.getLogger(__name__)

_WORDS: dict[Matmul, str] = {"default": "torch's default", "onednn": "oneDNN"}


def choose_cpu_matmul(
    flag: str,
    *,
    precision: str,
    saved: Sequence[Matmul] | None,
    control: Communicator,
    cpu: CpuInfo | None = None,
) -> list[Matmul]:
    """Selects and logs the matmul library of each rank's CPU; every rank calls it.

    Args:
        saved: the library of each rank in the checkpoint to resume from; None if none was saved.
        cpu: the CPU; None: the CPU of this machine.

    Returns:
        The library of each rank, which checkpoints save.

    Raises:
        ValueError: the library that --cpu-matmul requests is less exact than fp32 on this CPU.
    """
    cpu = cpu or CpuInfo.of_this_machine()
    choice = select_matmul(flag, cpu, saved_choice(saved, control.rank))
    fast = cpu.has_fast_matmul(DTYPES[precision])
    found = gather_json(control, [choice, cpu.name, fast])
    if control.rank == 0:
        named = [f"{_WORDS[one]} ({name})" for one, name, _ in found]
        logger.info("CPU matmul: %s", _by_rank(named))
        if precision != "fp32":
            logger.info("%s: %s", precision, _by_rank([_half(fast) for _, _, fast in found]))
    return [one for one, _, _ in found]


def _half(fast: bool) -> str:
    if fast:
        return "the CPU has matmul instructions for it: faster than fp32"
    return (
        "the CPU has no matmul instructions for it: matmuls are computed in fp32 and rounded, "
        "which is slower than fp32"
    )


def _by_rank(told: Sequence[str]) -> str:
    """Joins the ranks' texts: returns the text that all have, or each text with its ranks."""
    if len(set(told)) == 1:
        return told[0]
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(told):
        ranks.setdefault(text, []).append(f"rank {rank}")
    return "; ".join(f"{text} on {', '.join(who)}" for text, who in ranks.items())
