"""--plan: what every stage of a run will need, without weights, data, or any other rank."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from arguments.config_checks import check_model, check_optimizer
from arguments.settings import Settings
from common.tensors import DTYPES
from common.text import format_bytes, format_table
from modules.families.base import Family
from modules.registry import MODELS
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.advice import Change, helpful_changes
from planning.memory.dry_run import DryRun, PlannedModel, StageMemory

COLUMNS = (
    "stage",
    "layers",
    "parameters",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "peak",
    "held",
    "checkpoint",
)
EXPLAINED = """\
all of it on the device, of replica 0, which saves; activations: with messages and all that is made
on the way; peak: the most at once; held: microbatches between forward and the end of backward
"""


class MemoryPlan:
    """The plan of a run, from dry runs of its stages; ValueError if flags or config are wrong."""

    def __init__(self, settings: Settings) -> None:
        check_model(settings)
        check_optimizer(settings)
        self._settings, self._cuda = settings, plans_for_gpus(settings)
        family: Family = MODELS[settings.model.model_type].load()
        config: Any = family.load_config(settings.model.model_name)
        self._split = StageSplit(
            settings.model.num_layers,
            family.sizes(config),
            num_stages=settings.parallel.pipeline_group_size,
            seq_len=settings.update.seq_length,
        )
        self._model = PlannedModel(family, config, self._split.layers)

    @cached_property
    def _stages(self) -> list[StageMemory]:
        dry_run = DryRun(self._settings, self._model, cuda=self._cuda)
        num_stages = self._settings.parallel.pipeline_group_size
        return [dry_run.of_rank(stage) for stage in range(num_stages)]

    @property
    def fits(self) -> bool:
        """Whether no stage needs more than --device-memory, where that was given."""
        limit = self._settings.output.device_memory
        return limit is None or all(stage.peak <= limit for stage in self._stages)

    def parts(self) -> Iterator[str]:
        """The plan as text, part by part."""
        yield self._heading()
        yield format_table(self._rows(), justify=str.rjust) + "\n" + EXPLAINED
        yield "".join(f"{line}\n" for line in self._links())
        yield (
            self._split.describe(
                self._split.layers,
                schedule=self._settings.parallel.pp_mode,
                num_microbatches=self._settings.update.num_microbatches,
                recompute=self._settings.precision.recompute,
            )
            + "\n"
        )
        limit = self._settings.output.device_memory
        if limit is not None and not self.fits:
            yield "".join(f"{line}\n" for line in self._advice(limit))

    def _heading(self) -> str:
        settings, parallel, update = self._settings, self._settings.parallel, self._settings.update
        place = "on GPUs" if self._cuda else "on CPUs"
        recompute = "with" if settings.precision.recompute else "without"
        return (
            f"{settings.model.model_type}, {parallel.pipeline_group_size} stages x "
            f"{parallel.data_group_size} pipelines {place}, {settings.precision.precision}, "
            f"{update.optimizer}; {parallel.pp_mode} of {update.num_microbatches} microbatches of "
            f"{update.micro_batch_size} x {update.seq_length} tokens, {recompute} recompute\n"
        )

    def _rows(self) -> Iterator[list[str]]:
        limit, host = self._settings.output.device_memory, any(stage.host for stage in self._stages)
        fits = [] if limit is None else [f"fits {format_bytes(limit)}"]
        copied = any(stage.copied for stage in self._stages)
        more = [*(["copy to save"] if copied else []), *(["on host"] if host else [])]
        yield [*COLUMNS, *more, *fits]
        for index, stage in enumerate(self._stages):
            yield [
                str(index),
                str(self._split.layers[index]),
                *_cells(stage),
                *([format_bytes(stage.copied)] if copied else []),
                *([format_bytes(stage.host)] if host else []),
                *([] if limit is None else ["yes" if stage.peak <= limit else "NO"]),
            ]
        yield [
            "all",
            str(sum(self._split.layers)),
            *_cells(*self._stages),
            *([format_bytes(sum(stage.copied for stage in self._stages))] if copied else []),
            *([format_bytes(sum(stage.host for stage in self._stages))] if host else []),
            *([] if limit is None else ["yes" if self.fits else "NO"]),
        ]

    def _links(self) -> Iterator[str]:
        settings, last = self._settings, len(self._stages) - 1
        size = DTYPES[settings.precision.precision].itemsize
        activations = size * self._batch_tokens * self._model.config.hidden_size
        for index in range(last):
            sent = format_bytes(activations)
            yield f"stage {index} to {index + 1}: {sent} an iteration, and as much back"
        others = (settings.parallel.data_group_size - 1) / settings.parallel.data_group_size
        for index, stage in enumerate(self._stages if others else ()):
            again = size if settings.parallel.zero_stage == 1 else 4
            sent = format_bytes(round(others * (4 + again) * stage.parameters))
            yield f"each replica of stage {index}: {sent} an update, each way"
        if settings.parallel.world_size > 1:
            sent = format_bytes(self._token_bytes())
            yield f"rank 0 to the others: {sent} of tokens an iteration"

    @property
    def _batch_tokens(self) -> int:
        return self._settings.update.batch_size * self._settings.update.seq_length

    def _token_bytes(self) -> int:
        """To the stages of all pipelines, of which rank 0 keeps its own."""
        settings, stages = self._settings, len(self._stages)
        documents = settings.data.pack == "document"
        needs = [(stage == 0) + (stage == stages - 1) + documents for stage in range(stages)]
        sent = settings.parallel.data_group_size * sum(needs) - needs[0]
        return 8 * self._batch_tokens * sent

    def _advice(self, limit: int) -> Iterator[str]:
        peaks = [stage.peak for stage in self._stages]
        worst = peaks.index(max(peaks))
        excess = format_bytes(peaks[worst] - limit)
        yield f"stage {worst} needs {excess} more than {format_bytes(limit)}"
        changes = helpful_changes(
            self._settings, self._model, cuda=self._cuda, rank=worst, peak=peaks[worst]
        )
        for change in changes:
            yield f"  {change.flags}: {_describe_change(change, limit)}"
        if not changes:
            yield "  no flag reduces the memory further"


def _describe_change(change: Change, limit: int) -> str:
    fits = ", which fits" if change.peak <= limit else ""
    anew = " (a new run only)" if change.starts_anew else ""
    return f"{format_bytes(change.saved)} less, {format_bytes(change.peak)} at the peak{fits}{anew}"


def plans_for_gpus(settings: Settings) -> bool:
    """Whether the run is one on GPUs, which need not be on this machine."""
    use_cuda = settings.parallel.use_cuda
    return torch.cuda.is_available() if use_cuda is None else use_cuda


def _cells(*stages: StageMemory) -> list[str]:
    """From `parameters` on; of several stages, what they come to together."""
    names = ("weights", "gradients", "optimizer", "activations", "peak", "held", "checkpoint")
    cells = [f"{sum(stage.parameters for stage in stages) / 1e6:,.1f} M"]
    for name in names:
        values = [getattr(stage, name) for stage in stages]
        if name == "held":
            cells.append(str(values[0]) if len(stages) == 1 else "")
        else:
            cells.append(format_bytes(sum(values)))
    return cells
