"""--plan: the memory and messages of each stage, computed without weights, data or other ranks."""

from collections.abc import Iterator

import torch

from arguments.config_checks import check_model
from arguments.settings import Settings
from common.tensors import DTYPES
from common.text import format_bytes, format_table
from modules.registry import MODELS
from pipeline_parallel.partition.stage_split import StageSplit
from planning.link_time import time_over_links
from planning.memory.advice import Change, helpful_changes
from planning.memory.dry_run import PlannedModel
from planning.memory.plan_modes import PlannedModes
from planning.memory.stage_memory import StageMemory

EXPLAINED = """\
memory on the device of replica 0, which saves; activations: with messages and temporary tensors;
peak: the most bytes at once; held: microbatches between forward and the end of backward
"""


class MemoryPlan:
    """The memory plan of a run, from dry runs of its stages.

    Raises:
        ValueError: a flag or config.json is wrong.
    """

    def __init__(self, settings: Settings) -> None:
        check_model(settings)
        use_cuda = settings.parallel.use_cuda
        self._settings = settings
        self._cuda = torch.cuda.is_available() if use_cuda is None else use_cuda
        family = MODELS[settings.model.model_type].load()
        config = family.load_config(settings.model.model_name)
        self._sizes = family.sizes(config)
        self._split = StageSplit(
            settings.model.num_layers,
            self._sizes,
            num_stages=settings.parallel.pipeline_group_size,
            seq_len=settings.update.seq_length,
        )
        self._model = PlannedModel(family, config, self._split.layers)
        self._modes = PlannedModes(settings, self._model, cuda=self._cuda)

    @property
    def _stages(self) -> list[StageMemory]:
        return self._modes.stages

    @property
    def fits(self) -> bool:
        """Returns whether each stage fits into --device-memory; true without --device-memory."""
        limit = self._settings.output.device_memory
        return limit is None or all(stage.peak <= limit for stage in self._stages)

    def parts(self) -> Iterator[str]:
        """Yields the plan as text, part by part."""
        yield self._heading()
        if self._settings.precision.recompute == "auto":
            yield self._modes.table()
        rows = zip(*self._columns(), strict=True)
        yield format_table(rows, justify=str.rjust) + "\n" + EXPLAINED
        yield "".join(f"{line}\n" for line in self._links())
        description = self._split.describe(
            self._split.layers,
            schedule=self._settings.parallel.pp_mode,
            num_microbatches=self._settings.update.num_microbatches,
            recompute=self._modes.choice.value == "true",
        )
        yield f"{description}\n"
        if self._settings.output.link is not None:
            lines = time_over_links(self._modes.settings, self._sizes, is_cuda=self._cuda)
            yield "".join(f"{line}\n" for line in lines)
        limit = self._settings.output.device_memory
        if limit is not None and not self.fits:
            yield "".join(f"{line}\n" for line in self._advice(limit))

    def _heading(self) -> str:
        settings, parallel, update = self._settings, self._settings.parallel, self._settings.update
        place = "on GPUs" if self._cuda else "on CPUs"
        return (
            f"{settings.model.model_type}, {parallel.pipeline_group_size} stages x "
            f"{parallel.data_group_size} pipelines {place}, {settings.precision.precision}, "
            f"{update.optimizer}; {parallel.pp_mode} of {update.num_microbatches} microbatches of "
            f"{update.micro_batch_size} x {update.seq_length} tokens; recompute "
            f"{settings.precision.recompute}\n"
        )

    def _columns(self) -> Iterator[list[str]]:
        """Yields the columns of the table: a title, a value for each stage, and the total."""
        stages, limit = self._stages, self._settings.output.device_memory
        layers, counts = self._split.layers, [stage.parameters for stage in stages]
        yield ["stage", *map(str, range(len(stages))), "all"]
        yield ["layers", *map(str, layers), str(sum(layers))]
        yield ["parameters", *(f"{count / 1e6:,.1f} M" for count in (*counts, sum(counts)))]
        for name in ("weights", "gradients", "optimizer", "activations", "peak"):
            yield self._bytes_column(name, name)
        yield ["held", *(str(stage.held) for stage in stages), ""]
        yield self._bytes_column("checkpoint", "checkpoint")
        if any(stage.copied for stage in stages):
            yield self._bytes_column("copy to save", "copied")
        if any(stage.host for stage in stages):
            yield self._bytes_column("on host", "host")
        if limit is not None:
            fits = (*(stage.peak <= limit for stage in stages), self.fits)
            yield [f"fits {format_bytes(limit)}", *("yes" if fit else "NO" for fit in fits)]

    def _bytes_column(self, title: str, field: str) -> list[str]:
        sizes = [getattr(stage, field) for stage in self._stages]
        return [title, *map(format_bytes, (*sizes, sum(sizes)))]

    def _links(self) -> Iterator[str]:
        settings, parallel = self._settings, self._settings.parallel
        tokens = settings.update.batch_size * settings.update.seq_length
        size = DTYPES[settings.precision.precision].itemsize
        sent = format_bytes(size * tokens * self._model.config.hidden_size)
        for index in range(len(self._stages) - 1):
            yield f"stage {index} to {index + 1}: {sent} an iteration, and as much back"
        others = (parallel.data_group_size - 1) / parallel.data_group_size
        for index, stage in enumerate(self._stages if others else ()):
            again = size if parallel.zero_stage == 1 else 4
            sent = format_bytes(round(others * (4 + again) * stage.parameters))
            yield f"each replica of stage {index}: {sent} an update, each way"
        if parallel.world_size > 1:
            sent = format_bytes(8 * tokens * self._num_token_messages())
            yield f"rank 0 to the others: {sent} of tokens an iteration"

    def _num_token_messages(self) -> int:
        """Returns how many tensors (tokens, labels, document starts) rank 0 sends per iteration."""
        settings, num_stages = self._settings, len(self._stages)
        documents = settings.data.pack == "document"
        needs = [(s == 0) + (s == num_stages - 1) + documents for s in range(num_stages)]
        return settings.parallel.data_group_size * sum(needs) - needs[0]

    def _advice(self, limit: int) -> Iterator[str]:
        peaks = [stage.peak for stage in self._stages]
        peak = max(peaks)
        worst = peaks.index(peak)
        yield f"stage {worst} needs {format_bytes(peak - limit)} more than {format_bytes(limit)}"
        changes = helpful_changes(
            self._modes.settings, self._model, cuda=self._cuda, rank=worst, peak=peak
        )
        for change in changes:
            yield f"  {change.flags}: {_describe_change(change, limit)}"
        if not changes:
            yield "  no flag reduces the memory further"


def _describe_change(change: Change, limit: int) -> str:
    host = f", {format_bytes(change.host)} of host memory" if change.host else ""
    fits = ", which fits" if change.peak <= limit else ""
    anew = " (a new run only)" if change.starts_anew else ""
    saved, peak = format_bytes(change.saved), format_bytes(change.peak)
    return f"{saved} less, {peak} at the peak{fits}{host}{anew}"
