"""Which flags make a run need less memory, in the order of how much, for this very run."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

from arguments.flag_table import fixed_flags
from arguments.settings import Settings
from checkpoint.steps.folder import any_steps
from pipeline_parallel.partition.split import AUTO, Split
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.dry_run import DryRun, PlannedModel


class Change(NamedTuple):
    """Flags as a user would write them; bytes that they save, and the peak that is left.

    starts_anew: the checkpoints in --checkpoint-path are not ones to go on from with these flags.
    """

    flags: str
    saved: int
    peak: int
    starts_anew: bool


def helpful_changes(
    settings: Settings, model: PlannedModel, *, cuda: bool, rank: int, peak: int
) -> list[Change]:
    """Returns the changes that each let a rank need less than `peak` bytes, the best one first.

    With more stages, the stage that needs most counts.
    """
    found, has_steps = [], any_steps(settings.checkpoint.checkpoint_path)
    for flags, changed in _variants(settings):
        planned, ranks = model, [rank]
        if changed.parallel.pipeline_group_size != settings.parallel.pipeline_group_size:
            if changed.parallel.pipeline_group_size > model.config.num_hidden_layers:
                continue
            planned = model._replace(layers=_even(changed, model))
            ranks = _largest(changed.parallel.pipeline_group_size)
        dry_run = DryRun(changed, planned, cuda=cuda)
        left = max(dry_run.of_rank(one).peak for one in ranks)
        starts_anew = has_steps and fixed_flags(changed) != fixed_flags(settings)
        found.append(Change(flags, peak - left, left, starts_anew))
    return sorted((one for one in found if one.saved > 0), key=lambda one: -one.saved)


def _variants(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Each change of a flag that may help, and the flags with it."""
    if not settings.precision.recompute:
        yield "--recompute true", settings.changed(recompute=True)
    if settings.parallel.pp_mode != "1f1b":
        yield "--pp-mode 1f1b", settings.changed(pp_mode="1f1b")
    if settings.update.micro_batch_size > 1:
        yield "--micro-batch-size 1", settings.changed(micro_batch_size=1)
    if settings.parallel.data_group_size > 1 and settings.parallel.zero_stage == 0:
        yield "--zero-stage 1", settings.changed(zero_stage=1)
    if not settings.precision.use_offload:
        yield "--use-offload", settings.changed(use_offload=True)
    if settings.update.optimizer != "8bit-adam" and find_spec("bitsandbytes") is not None:
        yield "--optimizer 8bit-adam", settings.changed(optimizer="8bit-adam")
    if settings.precision.precision == "fp32":
        yield "--bf16", settings.changed(bf16=True)
    if settings.checkpoint.async_checkpoint:
        yield "no --async-checkpoint", settings.changed(async_checkpoint=False)
    stages = 2 * settings.parallel.pipeline_group_size
    yield (
        f"--pipeline-group-size {stages} --num-layers auto",
        settings.changed(
            pipeline_group_size=stages,
            world_size=stages * settings.parallel.data_group_size,
            num_layers=AUTO,
        ),
    )


def _largest(num_stages: int) -> list[int]:
    """The stages one of which needs most: at the ends, where embedding and head are and where
    schedules hold most, and beside them."""
    return sorted({0, 1, num_stages - 2, num_stages - 1})


def _even(settings: Settings, model: PlannedModel) -> Split:
    sizes, num_stages = model.family.sizes(model.config), settings.parallel.pipeline_group_size
    seq_len = settings.update.seq_length
    return StageSplit(AUTO, sizes, num_stages=num_stages, seq_len=seq_len).layers
