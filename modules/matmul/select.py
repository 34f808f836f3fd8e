"""Selection of the CPU's fp32 matmul library; the flag, the checkpoint and the CPU decide."""

import logging
from collections.abc import Sequence

from modules.matmul.backend import Matmul, choose_matmul, fp32_error, use_matmul
from modules.matmul.cpu_info import CpuInfo

logger = logging.getLogger(__name__)


def saved_choice(saved: Sequence[Matmul] | None, rank: int) -> Matmul | None:
    """Returns the library that the checkpoint saved for `rank`; None if it saved none."""
    return saved[rank] if saved is not None and rank < len(saved) else None


def select_matmul(flag: str, cpu: CpuInfo, saved: Matmul | None) -> Matmul:
    """Selects and activates the fp32 matmul library of this process, and returns it.

    Args:
        flag: the value of --cpu-matmul.
        cpu: the CPU of this machine.
        saved: the library that the checkpoint saved, if the run resumes.

    Raises:
        ValueError: --cpu-matmul requests oneDNN, but its results on this CPU are not true fp32.
    """
    requested = _requested(flag, cpu, saved)
    if requested == "onednn" and not cpu.has_avx512:
        why = "the checkpoint was made with oneDNN" if flag == "auto" else f"--cpu-matmul {flag}"
        logger.warning(
            "%s: oneDNN fp32 matmul needs AVX-512, which this CPU (%s) lacks; "
            "using torch's default",
            why,
            cpu.name,
        )
        requested = "default"
    use_matmul(requested)
    return _check_onednn(flag, cpu) if requested == "onednn" else requested


def _requested(flag: str, cpu: CpuInfo, saved: Matmul | None) -> Matmul:
    if flag == "auto":
        return saved or choose_matmul(cpu)
    requested: Matmul = "onednn" if flag == "onednn" else "default"
    if saved is not None and saved != requested:
        logger.info("--cpu-matmul is now %s, it was %s", requested, saved)
    return requested


def _check_onednn(flag: str, cpu: CpuInfo) -> Matmul:
    """Returns "onednn" if its results are true fp32; else activates and returns "default".

    Raises ValueError instead of returning "default" if the flag requests oneDNN.
    """
    error = fp32_error()
    if error <= 1.0:
        return "onednn"
    use_matmul("default")
    problem = (
        f"oneDNN fp32 matmul on this CPU ({cpu.name}) has {error:.0f} times the error that fp32 "
        "rounding allows"
    )
    if flag == "onednn":
        raise ValueError(f"--cpu-matmul onednn: {problem}; expected auto or default")
    logger.warning("%s; using torch's default", problem)
    return "default"
