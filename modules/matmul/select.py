"""Selects the fp32 matmul of a CPU: the flag, what the checkpoint used, what the CPU supports."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from modules.matmul.backend import Matmul, can_use_onednn, choose_matmul, fp32_error, use_matmul
from modules.matmul.cpu_info import CpuInfo

logger = logging.getLogger(__name__)


def kept_choice(kept: Sequence[Matmul] | None, rank: int) -> Matmul | None:
    """What a rank multiplied with when the checkpoint was made; None where it does not tell.

    A rank that the run did not have then, of a replica that was added, has nothing to keep.
    """
    return kept[rank] if kept is not None and rank < len(kept) else None


def select_matmul(flag: str, processor: CpuInfo, kept: Matmul | None) -> Matmul:
    """Selects and activates the matmul of this process.

    Args:
        flag: the value of --cpu-matmul.
        kept: what the checkpoint was made with, if the run resumes.

    Raises:
        ValueError: --cpu-matmul asks for a matmul that is not exact to fp32 on this CPU.
    """
    wanted = _wanted(flag, processor, kept)
    if wanted == "onednn" and not can_use_onednn(processor):
        why = "the checkpoint was made with oneDNN" if flag == "auto" else f"--cpu-matmul {flag}"
        logger.warning(
            "%s: oneDNN fp32 matmul needs AVX-512, which this CPU (%s) lacks; "
            "using torch's default",
            why,
            processor.name,
        )
        wanted = "default"
    use_matmul(wanted)
    return _checked(flag, processor) if wanted == "onednn" else wanted


def _wanted(flag: str, processor: CpuInfo, kept: Matmul | None) -> Matmul:
    if flag == "auto":
        return kept or choose_matmul(processor)
    asked: Matmul = "onednn" if flag == "onednn" else "default"
    if kept is not None and kept != asked:
        logger.info("--cpu-matmul is now %s, it was %s", asked, kept)
    return asked


def _checked(flag: str, processor: CpuInfo) -> Matmul:
    """oneDNN where its products are fp32's; else torch's default, or an error where asked for."""
    error = fp32_error()
    if error <= 1.0:
        return "onednn"
    use_matmul("default")
    problem = (
        f"on this processor ({processor.name}) oneDNN's fp32 products are off by {error:.0f} times "
        "what fp32 rounding allows"
    )
    if flag == "onednn":
        raise ValueError(f"--cpu-matmul onednn: {problem}: expected auto or default")
    logger.warning("%s: torch's default multiplies", problem)
    return "default"
