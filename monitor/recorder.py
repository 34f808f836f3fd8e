"""Recorders of a run: one object for metrics, plot, progress line and wandb.

Rank 0 has a `FileRecorder`; the other ranks have a `Recorder`, which records nothing.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monitor.metrics import HeldOut, IterationMetrics, MetricsFile
from monitor.plot import draw_loss
from monitor.progress import Progress
from monitor.wandb_run import WandbRun, open_wandb

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"
PLOT_NAME = "loss.png"


class Recorder:
    """The interface of recorders. Ranks other than 0 use this class itself, which records nothing.

    run_id: the id of the run at wandb; checkpoints save the id.
    """

    run_id: str | None = None

    def log_evaluation(self, step: int, held_out: HeldOut) -> None:
        """Records an evaluation before the first iteration."""

    def log_iteration(self, metrics: IterationMetrics) -> None:
        """Records an iteration, and the evaluation after it if there was an evaluation."""

    def before_save(self) -> None:
        """Writes pending metrics before a checkpoint is written."""

    def after_save(self) -> None:
        """Updates the plot after a checkpoint was written."""

    def close(self) -> None:
        """Closes the records of the run."""


class FileRecorder(Recorder):
    """The recorder of rank 0: metrics.jsonl and loss.png in `folder`, the progress line, and wandb.

    If the disk is full, the lines of metrics stay in memory until the disk has space.
    """

    def __init__(
        self, folder: Path, metrics: MetricsFile, progress: Progress, wandb: WandbRun
    ) -> None:
        self._folder, self._metrics, self._progress, self._wandb = folder, metrics, progress, wandb
        self._unwritten: list[IterationMetrics] = []
        self.run_id = wandb.run_id

    def log_evaluation(self, step: int, held_out: HeldOut) -> None:
        self._progress.show_evaluation(step, held_out)

    def log_iteration(self, metrics: IterationMetrics) -> None:
        self._unwritten.append(metrics)
        self._write(warn=len(self._unwritten) == 1)
        self._progress.update(metrics)
        self._wandb.log(metrics.to_json(), metrics.step)

    def before_save(self) -> None:
        """Writes pending lines, which a run resumed from the checkpoint would otherwise lose."""
        if self._unwritten:
            self._write(warn=False)

    def after_save(self) -> None:
        draw_loss(self._folder / METRICS_NAME, self._folder / PLOT_NAME)

    def close(self) -> None:
        if self._unwritten:
            logger.warning("%s lacks the last %d lines", self._metrics.path, len(self._unwritten))
        self._progress.close()
        self._wandb.close()

    def _write(self, *, warn: bool) -> None:
        """Writes the pending metrics; does not raise an OSError, but logs it if `warn` is true."""
        try:
            self._metrics.append(*self._unwritten)
        except OSError as error:
            if warn:
                path = self._metrics.path
                logger.warning("cannot write %s: %s; will write again later", path, error)
            return
        self._unwritten.clear()


def open_recorder(
    folder: Path,
    *,
    progress: Progress,
    resumed_step: int | None,
    project: str,
    config: Mapping[str, Any],
    run_id: str | None,
) -> FileRecorder:
    """Starts or continues the records in `folder`; the folder must exist.

    Args:
        progress: shows the progress line.
        resumed_step: the step of the checkpoint that the run continues from; None for a new run.
        project: the project at wandb.
        config: the flags of the run, for wandb.
        run_id: the id of the wandb run to continue; None for a new wandb run.
    """
    metrics = MetricsFile(folder / METRICS_NAME)
    if resumed_step is None:
        metrics.clear()
    else:
        metrics.cut_after(resumed_step)
    wandb = open_wandb(project=project, config=config, run_id=run_id, folder=folder)
    return FileRecorder(folder, metrics, progress, wandb)
