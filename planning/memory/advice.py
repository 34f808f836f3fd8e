"""Memory advice: the flags that reduce the memory of a run, sorted by the saved bytes."""

from collections.abc import Iterator
from typing import NamedTuple

from arguments.flag_table import fixed_flags
from arguments.settings import Settings
from checkpoint.steps.folder import any_steps
from modules.layers.selective import MODES
from pipeline_parallel.partition.split import AUTO
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.dry_run import DryRun, PlannedModel


class Change(NamedTuple):
    """A change of flags, the bytes that it saves, and the bytes that remain.

    Attributes:
        flags: the changed flags, as a user writes them.
        peak: the peak bytes on the device with these flags.
        host: the bytes in host memory with these flags, beside a GPU.
        starts_anew: whether a run with these flags cannot resume from --checkpoint-path.
    """

    flags: str
    saved: int
    peak: int
    host: int
    starts_anew: bool


def helpful_changes(
    settings: Settings, model: PlannedModel, *, cuda: bool, rank: int, peak: int
) -> list[Change]:
    """Returns the flag changes that reduce the peak memory of `rank`, the best change first.

    `peak` is the peak of `rank` with the present flags. If a change alters the number of stages,
    `peak` is compared with the highest peak of the new stages.
    """
    changes, has_steps = [], any_steps(settings.checkpoint.checkpoint_path)
    for flags, changed in _variants(settings):
        planned, ranks, num_stages = model, [rank], changed.parallel.pipeline_group_size
        if num_stages != settings.parallel.pipeline_group_size:
            if num_stages > model.config.num_hidden_layers:
                continue
            sizes, seq_len = model.family.sizes(model.config), changed.update.seq_length
            split = StageSplit(AUTO, sizes, num_stages=num_stages, seq_len=seq_len)
            planned = model._replace(layers=split.layers)
            # One of the first two or last two stages has the highest peak: the ends hold embedding
            # and head, and schedules keep most microbatches in flight there.
            ranks = sorted({0, 1, num_stages - 2, num_stages - 1})
        dry_run = DryRun(changed, planned, cuda=cuda)
        stages = [dry_run.of_rank(r) for r in ranks]
        left, host = max(stage.peak for stage in stages), max(stage.host for stage in stages)
        starts_anew = has_steps and fixed_flags(changed) != fixed_flags(settings)
        changes.append(Change(flags, peak - left, left, host, starts_anew))
    return sorted((c for c in changes if c.saved > 0), key=lambda c: -c.saved)


def _variants(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """Yields the flags of each change that can reduce memory, and the changed settings."""
    modes = list(MODES)
    for value in modes[modes.index(settings.precision.recompute) + 1 :]:
        yield f"--recompute {value}", settings.changed(recompute=value)
    if settings.parallel.pp_mode != "1f1b":
        yield "--pp-mode 1f1b", settings.changed(pp_mode="1f1b")
    if settings.update.micro_batch_size > 1:
        yield "--micro-batch-size 1", settings.changed(micro_batch_size=1)
    if settings.parallel.data_group_size > 1 and settings.parallel.zero_stage == 0:
        yield "--zero-stage 1", settings.changed(zero_stage=1)
    if not settings.precision.use_offload:
        yield "--use-offload", settings.changed(use_offload=True)
    if settings.update.optimizer != "8bit-adam":
        yield "--optimizer 8bit-adam", settings.changed(optimizer="8bit-adam")
    if settings.precision.precision == "fp32":
        yield "--bf16", settings.changed(bf16=True)
    if settings.checkpoint.async_checkpoint:
        yield "no --async-checkpoint", settings.changed(async_checkpoint=False)
    stages = 2 * settings.parallel.pipeline_group_size
    world_size = stages * settings.parallel.data_group_size
    changed = settings.changed(pipeline_group_size=stages, world_size=world_size, num_layers=AUTO)
    yield f"--pipeline-group-size {stages} --num-layers auto", changed
