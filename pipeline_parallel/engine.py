"""Joins schedule, stage and channel: one iteration of one pipeline's batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from modules.dropout import Keys
from pipeline_parallel.channel import PipelineChannel
from pipeline_parallel.schedule import Action, Kind, Schedule, forward_only
from pipeline_parallel.stage import IGNORED, Stage


class Losses(NamedTuple):
    """The sum of token losses of each microbatch, and over how many tokens all are.

    Only the last stage has any: elsewhere there are none, over 0 tokens.
    """

    of_microbatches: list[float]
    tokens: int

    @property
    def total(self) -> float:
        return sum(self.of_microbatches)


class StageError(RuntimeError):
    """A microbatch failed in a stage; the text has the stage, the microbatch and the shapes."""


class PipelineBatch:
    """One pipeline's rows of one iteration, cut into microbatches.

    `tokens` (rows, tokens) is there on the first stage, `labels` (rows, tokens) on the last;
    `keys` are the dropout keys of the rows.
    """

    def __init__(
        self, tokens: Tensor | None, labels: Tensor | None, keys: Sequence[int], rows: int
    ) -> None:
        self._tokens, self._labels, self._keys, self._rows = tokens, labels, keys, rows

    def tokens(self, microbatch: int) -> Tensor | None:
        return None if self._tokens is None else self._tokens[self._span(microbatch)]

    def labels(self, microbatch: int) -> Tensor | None:
        return None if self._labels is None else self._labels[self._span(microbatch)]

    def keys(self, microbatch: int) -> Keys:
        return self._keys[self._span(microbatch)]

    def num_trained(self) -> int:
        """Tokens that are predicted, as the last stage sees them; 0 elsewhere."""
        return 0 if self._labels is None else int((self._labels != IGNORED).sum())

    def _span(self, microbatch: int) -> slice:
        return slice(microbatch * self._rows, (microbatch + 1) * self._rows)


class Engine:
    """Runs batches of `num_microbatches` through this process's stage."""

    def __init__(
        self,
        stage: Stage,
        channel: PipelineChannel,
        *,
        schedule: Schedule,
        stage_index: int,
        num_stages: int,
        num_microbatches: int,
    ) -> None:
        self._stage, self._channel, self._index = stage, channel, stage_index
        self._train = list(schedule(stage_index, num_stages, num_microbatches))
        self._evaluate = list(forward_only(stage_index, num_stages, num_microbatches))
        self._not_finite: list[int] | None = None

    def train(self, batch: PipelineBatch, *, loss_scale: float) -> Losses:
        """Adds the gradients of the batch's token losses times `loss_scale` to the parameters'."""
        return self._run(self._train, batch, loss_scale=loss_scale)

    def evaluate(self, batch: PipelineBatch) -> Losses:
        """The batch's losses."""
        return self._run(self._evaluate, batch, loss_scale=None)

    def find_not_finite(self, batch: PipelineBatch) -> list[int]:
        """The microbatches whose numbers stop being finite in this very stage."""
        self._not_finite = []
        self.evaluate(batch)
        found, self._not_finite = self._not_finite, None
        return found

    def _run(
        self, actions: Iterable[Action], batch: PipelineBatch, *, loss_scale: float | None
    ) -> Losses:
        losses: list[Tensor] = []
        for action in actions:
            if action.kind is Kind.FORWARD:
                self._forward(action, batch, losses, training=loss_scale is not None)
            else:
                assert loss_scale is not None
                self._backward(action, loss_scale)
        self._channel.flush()
        return Losses([loss.item() for loss in losses], batch.num_trained())

    def _forward(
        self, action: Action, batch: PipelineBatch, losses: list[Tensor], *, training: bool
    ) -> None:
        received = self._channel.receive_activation()
        x = batch.tokens(action.microbatch) if received is None else received
        assert x is not None, "the first stage has token ids"
        labels = batch.labels(action.microbatch)
        try:
            if training:
                keys = batch.keys(action.microbatch)
                out = self._stage.forward(action.microbatch, x, labels, keys)
            else:
                out = self._stage.evaluate(x, labels)
                self._note(action.microbatch, x, out)
        except Exception as error:
            raise self._failure(action, x) from error
        if labels is None:
            self._channel.send_activation(out)
        else:
            losses.append(out)

    def _note(self, microbatch: int, x: Tensor, out: Tensor) -> None:
        if self._not_finite is not None and x.isfinite().all() and not out.isfinite().all():
            self._not_finite.append(microbatch)

    def _backward(self, action: Action, loss_scale: float) -> None:
        gradient = self._channel.receive_gradient()
        try:
            out = self._stage.backward(action.microbatch, gradient, loss_scale=loss_scale)
        except Exception as error:
            raise self._failure(action, gradient) from error
        self._channel.send_gradient(out)

    def _failure(self, action: Action, x: Tensor | None) -> StageError:
        given = "a loss" if x is None else f"{tuple(x.shape)} {x.dtype}"
        what = "forward" if action.kind is Kind.FORWARD else "backward"
        return StageError(
            f"stage {self._index}, {what} of microbatch {action.microbatch}, given {given}"
        )
