"""One iteration of training: forward, backward, the totals of all ranks, and the update if due."""

import logging
import math
from collections.abc import Callable

from arguments.settings import UpdateSettings
from comm.lifecycle.stop_signals import StopRequest
from comm.run_context import RunContext
from common.seeds import dropout_keys
from monitor.profiling.tracer import Tracer, Track
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state_dict import finite_weights
from optimizer.update import UpdateResult, UpdateStep, squared_norms
from pipeline_parallel.batch_scatter import BatchPrefetcher, Rows
from pipeline_parallel.engine import Engine, Losses
from pipeline_parallel.microbatch import PipelineBatch
from training.not_finite import NotFiniteReport
from training.step_totals import StepTotals, TotalsReducer

logger = logging.getLogger(__name__)


class TrainingStoppedError(RuntimeError):
    """An error after which training cannot continue, for example a loss that is not finite."""


class Iteration:
    """The code that runs one iteration after another; every process runs each iteration."""

    def __init__(
        self,
        settings: UpdateSettings,
        context: RunContext,
        *,
        engine: Engine,
        feed: BatchPrefetcher,
        update_step: UpdateStep,
        totals: TotalsReducer,
        report: NotFiniteReport,
        stop: StopRequest,
    ) -> None:
        self._settings, self._topology = settings, context.topology
        self._engine, self.feed, self.update_step = engine, feed, update_step
        self._totals, self._report, self._stop = totals, report, stop
        self._tokens_in_update, self._losses_are_finite = 0, True
        self._last_skip = ""  # why the last skipped update was skipped
        self._bad: tuple[PipelineBatch, Losses] | None = None  # last batch, if its loss was bad

    @property
    def _optimizer(self) -> MixedPrecisionOptimizer:
        return self.update_step.optimizer

    @property
    def _tracer(self) -> Tracer:
        return self._totals.tracer

    def advance(
        self, step: int, *, is_writing: Callable[[], bool] = lambda: False
    ) -> tuple[StepTotals, UpdateResult | None]:
        """Runs iteration `step` and, if the iteration ends an update, the update.

        The method calls `is_writing` after backward, to learn whether this process still writes a
        checkpoint. In the returned totals, `is_writing` tells whether any process still writes one.

        Returns:
            The totals of the iteration, and the result of the update; None in place of the result
            if the iteration ends no update.

        Raises:
            TrainingStoppedError: on every rank, if the loss or a gradient is not finite and the
                update cannot be skipped.
        """
        with self._tracer.step(step):
            totals = self._run(step, is_writing)
            return totals, self._update(step, totals)

    def check_weights(self, step: int) -> None:
        """Raises TrainingStoppedError on every rank if weights or moments are not finite."""
        bad = self._totals.first_bad(finite_weights(self._optimizer))
        if bad is not None:
            raise TrainingStoppedError(
                f"step {step}: {self._report.parameter_names[bad]} or its optimizer state is no "
                "longer finite: this step is not saved, and the checkpoints are unchanged; a lower "
                "--lr may help, or --bf16 in place of --fp16"
            )

    def explain_skips(self, step: int, saved: str) -> str:
        """Returns the text of the error with which the run gives up; every process calls it.

        `saved` is the part of the text that says whether the weights are saved.
        """
        cause = self._last_skip if self._bad is None else self._report.explain_loss(*self._bad)
        return (
            f"step {step}: {self.update_step.skipped_in_a_row} updates in a row were skipped "
            f"(--max-skipped-updates), the last one because {cause}; the weights are those before "
            f"these updates, {saved}; --bf16 or a loss scale below {self.update_step.scale:g} may "
            "help"
        )

    def _run(self, step: int, is_writing: Callable[[], bool]) -> StepTotals:
        settings, rows = self._settings, self.feed.next()
        if settings.begins_update(step):
            self._optimizer.gradients.begin_update(
                settings.gradient_accumulate_step * settings.num_microbatches
            )
        batch = self._batch(step, rows)
        losses = self._engine.train(batch, loss_scale=self.update_step.loss_scale)
        norms = None
        if settings.ends_update(step):
            self._optimizer.gradients.finish_exchange()
            norms = self._squared_norms()
        totals = self._totals.reduce(
            loss=losses.total,
            tokens=losses.num_trained_tokens,
            squared_norms=norms,
            stop_cause=self._stop.asked,
            is_writing=is_writing(),
        )
        if not self.update_step.may_skip:
            self._check_finite(step, totals, batch, losses)
        self._bad = None if math.isfinite(totals.loss) else (batch, losses)
        self._tokens_in_update += totals.tokens
        self._losses_are_finite &= math.isfinite(totals.loss)
        return totals

    def _squared_norms(self) -> list[float]:
        """Returns the squared norm of each weight's gradient in this stage.

        For each weight, one replica (the owner) returns the norm; the other replicas return 0.
        """
        gradients = dict(self._optimizer.gradients.reported())
        size = sum(gradient.numel() for gradient in gradients.values())
        with self._tracer.span(Track.OPTIMIZER_COMP, size=size):
            norms = dict(zip(gradients, squared_norms(list(gradients.values())), strict=True))
        return [norms.get(name, 0.0) for name in self._optimizer.names]

    def _update(self, step: int, totals: StepTotals) -> UpdateResult | None:
        if totals.squared_norm is None:
            return None
        is_finite = self._losses_are_finite
        result = self.update_step.apply(
            totals.squared_norm,
            num_trained_tokens=self._tokens_in_update,
            losses_are_finite=is_finite,
        )
        self._tokens_in_update, self._losses_are_finite = 0, True
        if result.grad_norm is None:
            self._last_skip = "the loss is not finite"
            if is_finite:
                self._last_skip = self._report.explain_gradients(totals)
            logger.info(
                "step %d: update skipped at loss scale %g: %s",
                step,
                result.loss_scale,
                self._last_skip,
            )
        return result

    def _batch(self, step: int, rows: Rows) -> PipelineBatch:
        """Returns this pipeline's batch, with the dropout seed of each sequence."""
        settings, topology = self._settings, self._topology
        update, inside = divmod(step - 1, settings.gradient_accumulate_step)
        first = (inside * topology.num_replicas + topology.replica) * settings.batch_size
        keys = dropout_keys(settings.seed, update=update, first=first, count=settings.batch_size)
        return PipelineBatch(
            rows.token_ids, rows.labels, keys, settings.micro_batch_size, rows.doc_starts
        )

    def _check_finite(
        self, step: int, totals: StepTotals, batch: PipelineBatch, losses: Losses
    ) -> None:
        """Raises TrainingStoppedError on every rank if the loss or a gradient is not finite."""
        if math.isfinite(totals.loss) and totals.first_bad is None:
            return
        if math.isfinite(totals.loss):
            assert totals.first_bad is not None
            name = self._report.parameter_names[totals.first_bad]
            problem = f"the gradient of {name} is not finite"
        else:
            problem = self._report.explain_loss(batch, losses)
        raise TrainingStoppedError(
            f"step {step}: {problem}; nothing was updated, and the checkpoints are unchanged; a "
            "lower --lr or cleaner data may help"
        )
