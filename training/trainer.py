"""The training loop: iterations, evaluations, metrics, checkpoints, and requests to stop."""

from typing import NoReturn

from arguments.settings import Settings
from comm.lifecycle.stop_signals import NOT_BEGUN, StopCause
from monitor.metrics import HeldOut, IterationMetrics, StepWork, Stopwatch
from monitor.recorder import Recorder
from optimizer.update import UpdateResult
from training.checkpointing import Saver
from training.evaluation import Evaluation
from training.iteration import Iteration, TrainingStoppedError


class Trainer:
    """The training loop, which ends after the last step; every process runs it."""

    def __init__(
        self,
        settings: Settings,
        *,
        iteration: Iteration,
        work: StepWork,
        evaluation: Evaluation | None,
        recorder: Recorder,
        saver: Saver,
    ) -> None:
        self._settings, self._iteration, self._work = settings, iteration, work
        self._evaluation, self._recorder, self._saver = evaluation, recorder, saver
        self._total_steps = settings.update.total_steps
        self._stop_cause: StopCause | None = None  # the same on all ranks

    def run(self, start: int) -> str | None:
        """Runs iterations `start` + 1 to the last; `start` is 0 or the step of the checkpoint.

        After a request to stop on any rank, all ranks finish the current update, save a checkpoint
        and return.

        Returns:
            A line that says why the run stopped early; None if the run is complete.
        """
        before = self._evaluate(0) if start == 0 else None
        if self._stop_cause is not None:
            return f"{self._stop_cause} {NOT_BEGUN}"
        if before is not None:
            self._recorder.log_evaluation(0, before)
        clock, saver = Stopwatch(), self._saver
        for step in range(start + 1, self._total_steps + 1):
            totals, result = self._iteration.advance(step, is_writing=lambda: saver.is_writing)
            self._stop_cause = self._stop_cause or totals.stop_cause
            seconds = clock.lap()
            is_due = self._settings.data.evaluates_after(step, total_steps=self._total_steps)
            with clock.paused():
                held_out = self._evaluate(step) if is_due else None
            metrics = IterationMetrics(
                step=step,
                loss=totals.loss / totals.tokens,
                lr=None if result is None else result.lr,
                grad_norm=None if result is None else result.grad_norm,
                num_trained_tokens=totals.tokens,
                work=self._work,
                step_seconds=seconds,
                loss_scale=self._loss_scale(result),
                held_out=held_out,
                held_out_before=before if step == 1 else None,
                resumed=step == start + 1 and start > 0,
            )
            self._recorder.log_iteration(metrics)
            with clock.paused():
                if not totals.is_writing:
                    self._finish_save()
                self._save_if_due(step)
            if self._stops_after(step):
                saved = f"step {step} is saved, but the run is not complete"
                return f"{self._stop_cause}: {saved}; the same command resumes it"
        return None

    def finish_after(self, stopped: TrainingStoppedError) -> NoReturn:
        """Waits for the pending save, then raises `stopped` again; every rank calls it."""
        try:
            self._finish_save(is_last=True)
            self._saver.close()
        except OSError as error:
            raise TrainingStoppedError(f"{stopped}; and {error}") from error
        raise stopped

    def _loss_scale(self, result: UpdateResult | None) -> float | None:
        """Returns the loss scale of the iteration; None without a loss scale (fp32, bf16)."""
        update_step = self._iteration.update_step
        if not update_step.may_skip:
            return None
        return update_step.scale if result is None else result.loss_scale

    def _evaluate(self, step: int) -> HeldOut | None:
        """Evaluates after `step`; returns None if there is no held-out data or the run stops.

        A request to stop does not end the evaluation after the last step, because a complete run
        needs the result of this evaluation.
        """
        may_stop = step < self._total_steps
        if self._evaluation is None or (self._stop_cause is not None and may_stop):
            return None
        result = self._evaluation.run(may_stop=may_stop)
        if isinstance(result, StopCause):
            self._stop_cause = result
            return None
        return result

    def _stops_after(self, step: int) -> bool:
        """Returns whether the run stops early after `step`; after the last step it never does."""
        if self._stop_cause is None or step == self._total_steps:
            return False
        return self._settings.update.ends_update(step)

    def _save_if_due(self, step: int) -> None:
        settings, iteration = self._settings, self._iteration
        gives_up = settings.update.ends_update(step) and iteration.update_step.has_given_up
        is_due = settings.checkpoint.saves_after(step, settings.update)
        if is_due or self._stops_after(step) or gives_up:
            iteration.check_weights(step)
            self._finish_save()
            self._recorder.before_save()
            is_last = gives_up or self._stops_after(step) or step == self._total_steps
            try:
                if self._saver.save(step, iteration.feed.state, is_last=is_last):
                    self._recorder.after_save()
            except OSError as error:  # the same on every rank
                if gives_up:
                    self._give_up(step, f"but {error}")
                raise
        if gives_up:
            self._give_up(step, "and are saved")

    def _give_up(self, step: int, saved: str) -> NoReturn:
        raise TrainingStoppedError(self._iteration.explain_skips(step, saved))

    def _finish_save(self, *, is_last: bool = False) -> None:
        if not self._saver.is_pending:
            return
        self._recorder.before_save()
        if self._saver.finish(is_last=is_last):
            self._recorder.after_save()
