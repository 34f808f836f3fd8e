"""Joins schedule, stage and channel: one iteration of one pipeline's batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from modules.dropout import Keys
from pipeline_parallel.channel import PipelineChannel
from pipeline_parallel.schedule import Action, Kind, Schedule, forward_only
from pipeline_parallel.stage import IGNORED, Stage, TokenLoss


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

    def train(self, batch: PipelineBatch) -> TokenLoss:
        """Adds the batch's gradients to the parameters'; the loss is the last stage's alone."""
        return self._run(self._train, batch, training=True)

    def evaluate(self, batch: PipelineBatch) -> TokenLoss:
        """The batch's loss, on the last stage; 0 over 0 tokens elsewhere."""
        return self._run(self._evaluate, batch, training=False)

    def _run(self, actions: Iterable[Action], batch: PipelineBatch, *, training: bool) -> TokenLoss:
        losses: list[Tensor] = []
        for action in actions:
            if action.kind is Kind.FORWARD:
                self._forward(action, batch, losses, training=training)
            else:
                self._backward(action)
        self._channel.flush()
        return TokenLoss(sum(loss.item() for loss in losses), batch.num_trained())

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
        except Exception as error:
            raise self._failure(action, x) from error
        if labels is None:
            self._channel.send_activation(out)
        else:
            losses.append(out)

    def _backward(self, action: Action) -> None:
        gradient = self._channel.receive_gradient()
        try:
            out = self._stage.backward(action.microbatch, gradient)
        except Exception as error:
            raise self._failure(action, gradient) from error
        self._channel.send_gradient(out)

    def _failure(self, action: Action, x: Tensor | None) -> StageError:
        given = "a loss" if x is None else f"{tuple(x.shape)} {x.dtype}"
        what = "forward" if action.kind is Kind.FORWARD else "backward"
        return StageError(
            f"stage {self._index}, {what} of microbatch {action.microbatch}, given {given}"
        )
