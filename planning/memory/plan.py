"""--plan: what every stage of a run will need, without weights, data, or any other rank."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from arguments.checks import check_model, check_optimizer
from arguments.settings import loop_settings
from common.tensors import DTYPES
from common.text import _table, in_units
from modules.families.base import Family
from modules.registry import MODELS
from pipeline_parallel.partition.stage_split import StageSplit
from planning.memory.advice import Change, helpful_changes
from planning.memory.dry_run import DryRun, StageMemory

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
    """A run with these flags, rehearsed. ValueError where the flags or config.json are wrong."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_model(args)
        check_optimizer(args)
        self._args, self._cuda = args, plans_for_gpus(args)
        self._family: Family = MODELS[args.model_type].load()
        self._config: Any = self._family.load_config(args.model_name)
        self._settings = loop_settings(args)
        self._split = StageSplit(
            args.num_layers,
            args.model_type,
            self._config,
            num_stages=args.pipeline_group_size,
            tokens=args.seq_length,
        )

    @cached_property
    def _stages(self) -> list[StageMemory]:
        rehearsal = DryRun(
            self._args, self._family, self._config, self._split.layers, cuda=self._cuda
        )
        return [rehearsal.of_rank(stage) for stage in range(self._args.pipeline_group_size)]

    @property
    def fits(self) -> bool:
        """Whether no stage needs more than --device-memory, where that was given."""
        limit = self._args.device_memory
        return limit is None or all(stage.peak <= limit for stage in self._stages)

    def parts(self) -> Iterator[str]:
        """The plan as text, part by part."""
        yield self._heading()
        yield _table(self._rows()) + EXPLAINED
        yield "".join(f"{line}\n" for line in self._links())
        yield (
            self._split.describe(
                self._split.layers,
                schedule=self._args.pp_mode,
                num_microbatches=self._settings.num_microbatches,
                recompute=self._args.recompute,
            )
            + "\n"
        )
        if not self.fits:
            yield "".join(f"{line}\n" for line in self._advice())

    def _heading(self) -> str:
        args, settings = self._args, self._settings
        place = "on GPUs" if self._cuda else "on CPUs"
        return (
            f"{args.model_type}, {args.pipeline_group_size} stages x {args.data_group_size} "
            f"pipelines {place}, {args.precision}, {args.optimizer}; {args.pp_mode} of "
            f"{settings.num_microbatches} microbatches of {settings.micro_rows} x "
            f"{settings.tokens} tokens, {'with' if args.recompute else 'without'} recompute\n"
        )

    def _rows(self) -> Iterator[list[str]]:
        limit, host = self._args.device_memory, any(stage.host for stage in self._stages)
        fits = [] if limit is None else [f"fits {in_units(limit)}"]
        copied = any(stage.copied for stage in self._stages)
        more = [*(["copy to save"] if copied else []), *(["on host"] if host else [])]
        yield [*COLUMNS, *more, *fits]
        for index, stage in enumerate(self._stages):
            yield [
                str(index),
                str(self._split.layers[index]),
                *_cells(stage),
                *([in_units(stage.copied)] if copied else []),
                *([in_units(stage.host)] if host else []),
                *([] if limit is None else ["yes" if stage.peak <= limit else "NO"]),
            ]
        yield [
            "all",
            str(sum(self._split.layers)),
            *_cells(*self._stages),
            *([in_units(sum(stage.copied for stage in self._stages))] if copied else []),
            *([in_units(sum(stage.host for stage in self._stages))] if host else []),
            *([] if limit is None else ["yes" if self.fits else "NO"]),
        ]

    def _links(self) -> Iterator[str]:
        args, settings, last = self._args, self._settings, len(self._stages) - 1
        size = DTYPES[args.precision].itemsize
        activations = size * settings.rows * settings.tokens * self._config.hidden_size
        for index in range(last):
            yield (
                f"stage {index} to {index + 1}: {in_units(activations)} an iteration, and as much "
                "back"
            )
        others = (args.data_group_size - 1) / args.data_group_size
        for index, stage in enumerate(self._stages if others else ()):
            again = size if args.zero_stage == 1 else 4
            sent = round(others * (4 + again) * stage.parameters)
            yield f"each replica of stage {index}: {in_units(sent)} an update, each way"
        if args.world_size > 1:
            yield f"rank 0 to the others: {in_units(self._token_bytes())} of tokens an iteration"

    def _token_bytes(self) -> int:
        """To the stages of all pipelines, of which rank 0 keeps its own."""
        args, stages = self._args, len(self._stages)
        documents = args.pack == "document"
        needs = [(stage == 0) + (stage == stages - 1) + documents for stage in range(stages)]
        sent = args.data_group_size * sum(needs) - needs[0]
        return int(8 * self._settings.rows * self._settings.tokens * sent)

    def _advice(self) -> Iterator[str]:
        limit, peaks = self._args.device_memory, [stage.peak for stage in self._stages]
        worst = peaks.index(max(peaks))
        yield f"stage {worst} needs {in_units(peaks[worst] - limit)} more than {in_units(limit)}"
        changes = helpful_changes(
            self._args,
            self._family,
            self._config,
            self._split.layers,
            cuda=self._cuda,
            rank=worst,
            peak=peaks[worst],
        )
        for change in changes:
            yield f"  {change.flags}: {_outcome(change, limit)}"
        if not changes:
            yield "  no flag makes it need less"


def _outcome(change: Change, limit: int) -> str:
    fits = ", which fits" if change.peak <= limit else ""
    anew = " (a new run only)" if change.starts_anew else ""
    return f"{in_units(change.saved)} less, {in_units(change.peak)} at the peak{fits}{anew}"


def plans_for_gpus(args: argparse.Namespace) -> bool:
    """Whether the run is one on GPUs, which need not be on this machine."""
    return torch.cuda.is_available() if args.use_cuda is None else bool(args.use_cuda)


def _cells(*stages: StageMemory) -> list[str]:
    """From `parameters` on; of several stages, what they come to together."""
    names = ("weights", "gradients", "optimizer", "activations", "peak", "held", "checkpoint")
    cells = [f"{sum(stage.parameters for stage in stages) / 1e6:,.1f} M"]
    for name in names:
        values = [getattr(stage, name) for stage in stages]
        if name == "held":
            cells.append(str(values[0]) if len(stages) == 1 else "")
        else:
            cells.append(in_units(sum(values)))
    return cells
