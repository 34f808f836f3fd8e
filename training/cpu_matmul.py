"""How a run multiplies matrices on CPUs: settled before the first product, told, and kept.

Each rank decides by its own processor, and keeps on resume what its checkpoint was made with: the
bits of a run depend on it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from comm.communicator import Communicator
from comm.objects import gather_json
from modules.matmul.backend import Matmul, can_use_onednn, choose_matmul, fp32_error, use_matmul
from modules.matmul.cpu_info import Processor
from optimizer.mixed_precision import DTYPES

logger = logging.getLogger(__name__)

_WORDS: dict[Matmul, str] = {"default": "torch's default", "onednn": "oneDNN"}


def settle_products(
    flag: str,
    *,
    precision: str,
    meta: Mapping[str, Any] | None,
    control: Communicator,
    processor: Processor | None = None,
) -> list[Matmul]:
    """Settles and tells what multiplies on a CPU; every rank's choice, for the checkpoint.

    `meta` is that of the checkpoint resumed from, None without; `processor` is that of this
    machine. Every rank calls it. ValueError where --cpu-matmul asks for products that are not true
    fp32 here.
    """
    processor = processor or Processor.of_this_machine()
    choice = _settle(flag, processor, kept_choice(meta, control.rank))
    fast = processor.has_fast_products(DTYPES[precision])
    found = gather_json(control, [choice, processor.name, fast])
    if control.rank == 0:
        named = [f"{_WORDS[one]} ({name})" for one, name, _ in found]
        logger.info("matrix products: %s", _by_rank(named))
        if precision != "fp32":
            logger.info("%s: %s", precision, _by_rank([_half(fast) for _, _, fast in found]))
    return [one for one, _, _ in found]


def kept_choice(meta: Mapping[str, Any] | None, rank: int) -> Matmul | None:
    """What a rank multiplied with when the checkpoint was made; None where it does not tell.

    A rank that the run did not have then, of a replica that was added, has nothing to keep.
    """
    kept = [] if meta is None else meta.get("cpu_matmul") or []
    return kept[rank] if rank < len(kept) else None


def _settle(flag: str, processor: Processor, kept: Matmul | None) -> Matmul:
    wanted = _wanted(flag, processor, kept)
    if wanted == "onednn" and not can_use_onednn(processor):
        why = "the checkpoint was made with oneDNN" if flag == "auto" else f"--cpu-matmul {flag}"
        logger.warning(
            "%s: torch has oneDNN's fp32 products only with AVX-512, which this processor (%s) has "
            "not: torch's default multiplies",
            why,
            processor.name,
        )
        wanted = "default"
    use_matmul(wanted)
    return _checked(flag, processor) if wanted == "onednn" else wanted


def _wanted(flag: str, processor: Processor, kept: Matmul | None) -> Matmul:
    if flag == "auto":
        return kept or choose_matmul(processor)
    asked: Matmul = "onednn" if flag == "onednn" else "default"
    if kept is not None and kept != asked:
        logger.info("--cpu-matmul is now %s, it was %s", asked, kept)
    return asked


def _checked(flag: str, processor: Processor) -> Matmul:
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


def _half(fast: bool) -> str:
    if fast:
        return "the processor has instructions for its products: faster than fp32"
    return (
        "the processor has no instructions for its products: they are computed in fp32 and "
        "rounded, which is slower than fp32"
    )


def _by_rank(told: Sequence[str]) -> str:
    """What all ranks have in common, or who has what."""
    if len(set(told)) == 1:
        return told[0]
    ranks: dict[str, list[str]] = {}
    for rank, text in enumerate(told):
        ranks.setdefault(text, []).append(f"rank {rank}")
    return "; ".join(f"{text} on {', '.join(who)}" for text, who in ranks.items())
