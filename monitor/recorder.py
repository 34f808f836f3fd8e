"""Everything that tells what a run does, behind one object: rank 0's does it, others' is silent."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from monitor.console import Console
from monitor.metrics import HeldOut, IterationMetrics, MetricsFile
from monitor.plot import draw_loss
from monitor.progress import Progress
from monitor.wandb_run import RemoteRun, open_wandb

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"


class Recorder(Protocol):
    """Told of what happens, in the order in which it happens."""

    @property
    def run_id(self) -> str | None:
        """The wandb run's id, to be kept in checkpoints."""

    def evaluated(self, step: int, held_out: HeldOut) -> None:
        """An evaluation before the first iteration."""

    def iteration(self, metrics: IterationMetrics) -> None:
        """An iteration has ended, and its evaluation where one was due."""

    def saving(self) -> None:
        """A checkpoint is about to be written."""

    def saved(self) -> None:
        """A checkpoint has been written."""

    def close(self) -> None:
        """The run has ended."""


class SilentRecorder:
    """What the ranks other than 0 have."""

    run_id: str | None = None

    def evaluated(self, step: int, held_out: HeldOut) -> None: ...

    def iteration(self, metrics: IterationMetrics) -> None: ...

    def saving(self) -> None: ...

    def saved(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class FileRecorder:
    """metrics.jsonl and loss.png under `folder`, the progress line, and wandb.

    Lines that the disk does not take wait in `unwritten` until it does.
    """

    folder: Path
    metrics: MetricsFile
    progress: Progress
    wandb: RemoteRun
    unwritten: list[IterationMetrics] = field(default_factory=list)

    @property
    def run_id(self) -> str | None:
        return self.wandb.run_id

    def evaluated(self, step: int, held_out: HeldOut) -> None:
        self.progress.evaluated(step, held_out)

    def iteration(self, metrics: IterationMetrics) -> None:
        self.unwritten.append(metrics)
        self._write(tell=len(self.unwritten) == 1)
        self.progress.update(metrics)
        self.wandb.log(metrics.to_json(), metrics.step)

    def saving(self) -> None:
        """Where the disk has room again, lines that waited are written: a start that goes on from
        the checkpoint does not have them."""
        if self.unwritten:
            self._write(tell=False)

    def saved(self) -> None:
        draw_loss(self.folder / METRICS_NAME, self.folder / PLOT_NAME)

    def close(self) -> None:
        if self.unwritten:
            logger.warning("%s lacks the last %d lines", self.metrics.path, len(self.unwritten))
        self.progress.close()
        self.wandb.close()

    def _write(self, *, tell: bool) -> None:
        """A full disk costs no training: it is told once, and again if it comes back."""
        try:
            self.metrics.append(*self.unwritten)
        except OSError as error:
            if tell:
                logger.warning("%s cannot be written: %s; its lines wait", self.metrics.path, error)
            return
        self.unwritten.clear()


def open_recorder(
    folder: Path,
    *,
    console: Console,
    total_steps: int,
    resumed_step: int | None,
    project: str,
    config: Mapping[str, Any],
    run_id: str | None,
) -> FileRecorder:
    """Begins or, from `resumed_step`, continues the records under `folder`, which must exist."""
    metrics = MetricsFile(folder / METRICS_NAME)
    if resumed_step is None:
        metrics.start_afresh()
    else:
        metrics.cut_after(resumed_step)
    wandb = open_wandb(project=project, config=config, run_id=run_id, folder=folder)
    return FileRecorder(folder, metrics, Progress(total_steps, console), wandb)
