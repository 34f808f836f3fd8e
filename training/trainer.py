"""The loop that every rank runs: iterations, updates, evaluations, saves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol

from arguments.settings import LoopSettings
from comm.communicator import Communicator
from comm.lifecycle.stop_signals import NOT_BEGUN, StopCause, StopRequest
from comm.objects import broadcast_json, gather_json
from comm.topology import Topology
from modules.layers.dropout import derive_seed
from monitor.metrics import HeldOut, IterationMetrics, Stopwatch
from monitor.profiling.tracer import Tracer, Track
from monitor.recorder import Recorder
from optimizer.clipping import squared_norms
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state_dict import finite_weights
from optimizer.update import UpdateResult, UpdateStep
from pipeline_parallel.batch_scatter import BatchFeed, Rows
from pipeline_parallel.engine import Engine, Losses
from pipeline_parallel.microbatch import PipelineBatch
from training.evaluation import Evaluation
from training.step_totals import StepTotals, TotalsReducer

logger = logging.getLogger(__name__)


class TrainingStoppedError(RuntimeError):
    """Training cannot go on: numbers are no longer finite."""


class Saves(Protocol):
    """Saves steps; every process calls all of it alike (see `training.checkpointing.Saver`)."""

    @property
    def is_pending(self) -> bool:
        """Whether a step was begun and is not saved yet."""

    @property
    def is_writing(self) -> bool:
        """Whether this process still writes what is pending."""

    def save(self, step: int, data: Mapping[str, Any], *, is_last: bool) -> bool:
        """Whether the step is saved now: it failed, or is pending, else."""

    def finish(self, *, is_last: bool = False) -> bool:
        """Whether what was pending is saved now; waits for it."""

    def close(self) -> None:
        """Waits until what saves have dropped is removed."""


class Trainer:
    """Trains from one step to the last, and saves through `saves`.

    `parameter_names` are those of all stages, in the order of the agreement's slots, for messages.
    """

    def __init__(
        self,
        settings: LoopSettings,
        *,
        topology: Topology,
        control: Communicator,
        engine: Engine,
        feed: BatchFeed,
        optimizer: MixedPrecisionOptimizer,
        updater: UpdateStep,
        agreement: TotalsReducer,
        parameter_names: Sequence[str],
        evaluation: Evaluation | None,
        recorder: Recorder,
        tracer: Tracer,
        stop: StopRequest,
        saves: Saves,
    ) -> None:
        self._settings, self._topology, self._control = settings, topology, control
        self._engine, self._feed = engine, feed
        self._optimizer, self._updater, self._agreement = optimizer, updater, agreement
        self._names = parameter_names
        self._evaluation, self._recorder, self._saves = evaluation, recorder, saves
        self._tracer, self._stop = tracer, stop
        self._asked: StopCause | None = None  # to stop, as all ranks have agreed
        self._is_written = True  # all that any rank writes beside training, as they have agreed
        self._tokens_in_update, self._losses_are_finite = 0, True
        self._skipped_since = ""  # why the last skipped update was
        self._bad: tuple[PipelineBatch, Losses] | None = None  # the iteration's, if not finite

    def run(self, start: int) -> str | None:
        """Runs iterations `start` + 1 to the last; `start` is 0 or the step resumed from.

        Where a rank is asked to stop before, all save at the next update's end; returns a line that
        says so, None where the run is complete.
        """
        try:
            return self._run(start)
        except TrainingStoppedError as stopped:  # on every rank: what was begun is to be whole
            try:
                self._finish_save(is_last=True)
                self._saves.close()
            except OSError as error:
                raise TrainingStoppedError(f"{stopped}; and {error}") from error
            raise

    def _run(self, start: int) -> str | None:
        before = self._evaluate(0) if start == 0 else None
        if self._asked is not None:
            return f"{self._asked} {NOT_BEGUN}"
        if before is not None:
            self._recorder.evaluated(0, before)
        clock = Stopwatch()
        for step in range(start + 1, self._settings.total_steps + 1):
            totals, outcome = self.advance(step)
            seconds = clock.lap()
            due = self._settings.evaluates_after(step)
            with clock.paused():
                held_out = self._evaluate(step) if due else None
            metrics = IterationMetrics(
                step=step,
                loss=totals.loss / totals.tokens,
                lr=None if outcome is None else outcome.lr,
                grad_norm=None if outcome is None else outcome.grad_norm,
                tokens=totals.tokens,
                step_seconds=seconds,
                loss_scale=self._shown_scale(outcome),
                held_out=held_out,
                held_out_before=before if step == 1 else None,
                resumed=step == start + 1 and start > 0,
            )
            self._recorder.iteration(metrics)
            with clock.paused():
                if self._is_written:
                    self._finish_save()
                self._save_if_due(step)
            if self._stops_after(step):
                done = f"step {step} is saved, not finished"
                return f"{self._asked}: {done}; the same command goes on"
        return None

    def advance(self, step: int) -> tuple[StepTotals, UpdateResult | None]:
        """One iteration, and the update that it ends, if it ends one."""
        with self._tracer.step(step):
            totals = self._iterate(step)
            return totals, self._update(step, totals)

    def _stops_after(self, step: int) -> bool:
        """Not after the last step: the run is complete."""
        if self._asked is None or step == self._settings.total_steps:
            return False
        return self._settings.ends_update(step)

    def _save_if_due(self, step: int) -> None:
        given_up = self._settings.ends_update(step) and self._updater.has_given_up
        if self._settings.saves_after(step) or self._stops_after(step) or given_up:
            self._check_weights(step)
            self._finish_save()
            self._recorder.saving()
            is_last = given_up or self._stops_after(step) or step == self._settings.total_steps
            try:
                if self._saves.save(step, self._feed.state, is_last=is_last):
                    self._recorder.saved()
            except OSError as error:  # the same on every rank
                if given_up:
                    self._give_up(step, f"but {error}")
                raise
        if given_up:
            self._give_up(step, "and saved")

    def _give_up(self, step: int, saved: str) -> NoReturn:
        why = self._skipped_since if self._bad is None else self._explain_loss(*self._bad)
        raise TrainingStoppedError(
            f"step {step}: {self._updater.skipped_in_a_row} updates in a row were skipped "
            f"(--max-skipped-updates), the last since {why}; the weights are those before them, "
            f"{saved}; --bf16 or a loss scale below {self._updater.scale:g} may help"
        )

    def _finish_save(self, *, is_last: bool = False) -> None:
        if not self._saves.is_pending:
            return
        self._recorder.saving()
        if self._saves.finish(is_last=is_last):
            self._recorder.saved()

    def _check_weights(self, step: int) -> None:
        """Stops every rank where a checkpoint would hold numbers that no start accepts."""
        bad = self._agreement.first_bad(finite_weights(self._optimizer))
        if bad is not None:
            raise TrainingStoppedError(
                f"step {step}: {self._names[bad]} is not finite any more, or its optimizer state "
                "is not: this step is not saved, and checkpoints are as they were; a lower --lr "
                "may help, or --bf16 in place of --fp16"
            )

    def _iterate(self, step: int) -> StepTotals:
        """Forward and backward of one iteration, and what all ranks agree on after it."""
        settings, rows = self._settings, self._feed.take()
        if settings.begins_update(step):
            self._optimizer.begin_update(settings.accumulate * settings.num_microbatches)
        batch = self._batch(step, rows)
        losses = self._engine.train(batch, loss_scale=self._updater.loss_scale)
        norms = None
        if settings.ends_update(step):
            self._optimizer.reduce_gradients()
            norms = self._squared_norms()
        totals = self._agreement.agree(
            loss=losses.total,
            tokens=losses.tokens,
            squared_norms=norms,
            asked=self._stop.asked,
            writing=self._saves.is_writing,
        )
        self._is_written = not totals.writing
        self._asked = self._asked or totals.asked
        if not self._updater.may_skip:
            self._check_finite(step, totals, batch, losses)
        self._bad = None if math.isfinite(totals.loss) else (batch, losses)
        self._tokens_in_update += totals.tokens
        self._losses_are_finite &= math.isfinite(totals.loss)
        return totals

    def _squared_norms(self) -> list[float]:
        """Of all this stage's gradients, 0 where another replica speaks for them."""
        mine = dict(self._optimizer.gradients())
        size = sum(gradient.numel() for gradient in mine.values())
        with self._tracer.span(Track.OPTIMIZER_COMP, size=size):
            norms = dict(zip(mine, squared_norms(list(mine.values())), strict=True))
        return [norms.get(name, 0.0) for name in self._optimizer.names]

    def _update(self, step: int, totals: StepTotals) -> UpdateResult | None:
        """The update that an iteration ends, if it ends one."""
        if totals.squared_norm is None:
            return None
        finite = self._losses_are_finite
        outcome = self._updater.apply(
            totals.squared_norm, tokens=self._tokens_in_update, losses_are_finite=finite
        )
        self._tokens_in_update, self._losses_are_finite = 0, True
        if outcome.grad_norm is None:
            self._skipped_since = self._name_bad(totals) if finite else "the loss is not finite"
            logger.info(
                "step %d: update skipped at loss scale %g: %s",
                step,
                outcome.loss_scale,
                self._skipped_since,
            )
        return outcome

    def _name_bad(self, totals: StepTotals) -> str:
        if totals.first_bad is None:  # each is finite, and their sum is not
            return "the gradient norm is not finite"
        return f"{self._names[totals.first_bad]} has a gradient that is not finite"

    def _shown_scale(self, outcome: UpdateResult | None) -> float | None:
        if not self._updater.may_skip:
            return None
        return self._updater.scale if outcome is None else outcome.loss_scale

    def _batch(self, step: int, rows: Rows) -> PipelineBatch:
        settings, topology = self._settings, self._topology
        update, inside = divmod(step - 1, settings.accumulate)
        first = (inside * topology.num_replicas + topology.replica) * settings.rows
        keys = [
            derive_seed(settings.seed, "dropout", update, sequence)
            for sequence in range(first, first + settings.rows)
        ]
        return PipelineBatch(rows.tokens, rows.labels, keys, settings.micro_rows, rows.begins)

    def _check_finite(
        self, step: int, totals: StepTotals, batch: PipelineBatch, losses: Losses
    ) -> None:
        """Stops every rank with the same words: nothing is ever trained on such numbers."""
        if math.isfinite(totals.loss) and totals.first_bad is None:
            return
        if math.isfinite(totals.loss):
            assert totals.first_bad is not None
            what = f"the gradient of {self._names[totals.first_bad]} is not finite"
        else:
            what = self._explain_loss(batch, losses)
        raise TrainingStoppedError(
            f"step {step}: {what}; nothing was updated, and checkpoints are as they were; a lower "
            "--lr or cleaner data may help"
        )

    def _explain_loss(self, batch: PipelineBatch, losses: Losses) -> str:
        """Which stage turned which text into a loss that is not finite."""
        topology, settings = self._topology, self._settings
        bad = [i for i, loss in enumerate(losses.of_microbatches) if not math.isfinite(loss)]
        found = gather_json(self._control, [bad, self._engine.find_not_finite(batch)])
        stages = sorted(
            {rank % topology.num_stages for rank, (_, here) in enumerate(found) if here}
        )
        rows = [
            rank // topology.num_stages * settings.rows + microbatch * settings.micro_rows + row
            for rank, (microbatches, _) in enumerate(found)
            for microbatch in microbatches
            for row in range(settings.micro_rows)
        ]
        text = self._feed.documents
        blocks = "; ".join(", ".join(text[row]) for row in rows) if text else ""
        blocks = broadcast_json(self._control, blocks)
        place = f"in stage {stages[0]}" if stages else "with dropout alone"
        return f"the loss is not finite, first {place}, on the blocks from {blocks}"

    def _evaluate(self, step: int) -> HeldOut | None:
        """None where there is no evaluation, or the run stops before it is done.

        The one after the last step is always done, as the run is complete with it.
        """
        may_stop = step < self._settings.total_steps
        if self._evaluation is None or (self._asked is not None and may_stop):
            return None
        found = self._evaluation.run(may_stop=may_stop)
        if not isinstance(found, StopCause):
            return found
        self._asked = found
        return None


class OutOfMemoryError(TrainingStoppedError):
    """A process needs more memory than there is; the text says what for, and what helps."""
