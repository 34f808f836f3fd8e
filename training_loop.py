"""The loop that every rank runs: iterations, updates, evaluations, saves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from comm.communicator import Communicator
from comm.topology import Topology
from data_parallel.flat_gradients import FlatGradients
from modules.dropout import derive_seed
from monitor.metrics import IterationMetrics
from monitor.recorder import Recorder
from optimizer.adam import Adam
from optimizer.agreement import Agreement, Totals, clip_factor, squared_norms
from optimizer.lr_schedule import linear_schedule
from pipeline_parallel.engine import Engine, PipelineBatch
from pipeline_parallel.feed import HostBatch, Rows, Scatter, TrainingFeed, evaluation_feed


class TrainingStoppedError(RuntimeError):
    """Training cannot go on: the loss is no longer a finite number."""


@dataclass(frozen=True)
class LoopSettings:
    """The numbers of a run. Steps are iterations; `accumulate` of them make an update.

    `rows` is one pipeline's batch and `micro_rows` a microbatch, in sequences of `tokens` tokens.
    """

    total_steps: int
    accumulate: int
    rows: int
    micro_rows: int
    tokens: int
    lr: float
    warmup_updates: int
    max_grad_norm: float
    checkpoint_steps: int
    evaluation_steps: int
    seed: int

    @property
    def total_updates(self) -> int:
        return self.total_steps // self.accumulate

    def nominal_tokens(self, num_replicas: int) -> int:
        """Predicted tokens of an update whose every token is trained."""
        return self.accumulate * num_replicas * self.rows * (self.tokens - 1)

    def ends_update(self, step: int) -> bool:
        return step % self.accumulate == 0

    def saves_after(self, step: int) -> bool:
        """A save due inside an accumulation happens at the update that ends it."""
        if not self.ends_update(step):
            return False
        every = self.checkpoint_steps
        due = every > 0 and step // every > (step - self.accumulate) // every
        return due or step == self.total_steps

    def evaluates_after(self, step: int) -> bool:
        every = self.evaluation_steps
        return step == self.total_steps or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class Evaluation:
    """The held-out loss of the whole evaluation data.

    `open_batches` opens them anew on rank 0, and is None elsewhere.
    """

    scatter: Scatter
    control: Communicator
    engine: Engine
    agreement: Agreement
    micro_rows: int
    open_batches: Callable[[], Iterator[HostBatch]] | None

    def run(self) -> float:
        """The mean loss of a trained token; every rank calls it and gets the same."""
        batches = None if self.open_batches is None else self.open_batches()
        loss, tokens = 0.0, 0
        for rows in evaluation_feed(self.scatter, self.control, batches):
            batch = PipelineBatch(rows.tokens, rows.labels, (), self.micro_rows)
            one = self.engine.evaluate(batch)
            loss, tokens = loss + one.total, tokens + one.tokens
        totals = self.agreement.agree(loss=loss, tokens=tokens, squared_norms=None)
        return totals.loss / totals.tokens


class TrainingLoop:
    """Trains from one step to the last; `save` writes a checkpoint, given step and data state."""

    def __init__(
        self,
        settings: LoopSettings,
        *,
        topology: Topology,
        replicas: Communicator,
        engine: Engine,
        feed: TrainingFeed,
        gradients: FlatGradients,
        optimizer: Adam,
        agreement: Agreement,
        evaluation: Evaluation | None,
        recorder: Recorder,
        save: Callable[[int, dict[str, Any]], None],
    ) -> None:
        self._settings, self._topology, self._replicas = settings, topology, replicas
        self._engine, self._feed, self._gradients = engine, feed, gradients
        self._optimizer, self._agreement = optimizer, agreement
        self._evaluation, self._recorder, self._save = evaluation, recorder, save
        self._nominal = settings.nominal_tokens(topology.num_replicas)
        self._tokens_in_update = 0

    def run(self, start: int) -> None:
        """Runs iterations `start` + 1 to the last; `start` is 0 or the step resumed from."""
        before = self._evaluate(start) if start == 0 else None
        if before is not None:
            self._recorder.evaluated(0, before)
        for step in range(start + 1, self._settings.total_steps + 1):
            began = time.perf_counter()
            totals = self._iterate(step)
            lr, norm = self._update(step, totals)
            seconds = time.perf_counter() - began
            due = self._settings.evaluates_after(step)
            metrics = IterationMetrics(
                step=step,
                loss=totals.loss / totals.tokens,
                lr=lr,
                grad_norm=norm,
                tokens=totals.tokens,
                step_seconds=seconds,
                eval_loss=self._evaluate(step) if due else None,
                eval_loss_before=before if step == 1 else None,
                resumed=step == start + 1 and start > 0,
            )
            self._recorder.iteration(metrics)
            if self._settings.saves_after(step):
                self._save(step, self._feed.state)
                self._recorder.saved()

    def _iterate(self, step: int) -> Totals:
        """Forward and backward of one iteration, and what all ranks agree on after it."""
        batch = self._batch(step, self._feed.take())
        loss = self._engine.train(batch)
        norms = None
        if self._settings.ends_update(step):
            self._gradients.all_reduce(self._replicas)
            norms = squared_norms(self._gradients.views)
        totals = self._agreement.agree(loss=loss.total, tokens=loss.tokens, squared_norms=norms)
        self._check_finite(step, totals)
        self._tokens_in_update += totals.tokens
        return totals

    def _update(self, step: int, totals: Totals) -> tuple[float | None, float | None]:
        """The update that an iteration ends: its learning rate and gradient norm, or None, None."""
        if totals.squared_norm is None:
            return None, None
        settings, optimizer = self._settings, self._optimizer
        correction = self._nominal / self._tokens_in_update
        norm = math.sqrt(totals.squared_norm) * correction
        self._gradients.scale_(correction * clip_factor(norm, settings.max_grad_norm))
        lr = linear_schedule(
            optimizer.updates,
            warmup=settings.warmup_updates,
            total=settings.total_updates,
            peak=settings.lr,
        )
        optimizer.step(lr)
        self._gradients.zero_()
        self._tokens_in_update = 0
        return lr, norm

    def _batch(self, step: int, rows: Rows) -> PipelineBatch:
        settings, topology = self._settings, self._topology
        update, inside = divmod(step - 1, settings.accumulate)
        first = (inside * topology.num_replicas + topology.replica) * settings.rows
        keys = [
            derive_seed(settings.seed, "dropout", update, sequence)
            for sequence in range(first, first + settings.rows)
        ]
        return PipelineBatch(rows.tokens, rows.labels, keys, settings.micro_rows)

    def _check_finite(self, step: int, totals: Totals) -> None:
        values = (
            [totals.loss] if totals.squared_norm is None else [totals.loss, totals.squared_norm]
        )
        if not all(map(math.isfinite, values)):
            what = "loss" if not math.isfinite(totals.loss) else "gradient norm"
            raise TrainingStoppedError(
                f"step {step}: the {what} is not finite, so nothing was updated; the last "
                "checkpoint is whole; a lower --lr or cleaner data may help"
            )

    def _evaluate(self, step: int) -> float | None:
        if self._evaluation is None:
            return None
        loss = self._evaluation.run()
        if not math.isfinite(loss):
            raise TrainingStoppedError(f"step {step}: the held-out loss is not finite")
        return loss
