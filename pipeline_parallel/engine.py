"""The pipeline engine, which runs a stage's part of an iteration in the order of a schedule.

Receives are posted early, so that messages travel while the stage computes. But no receive is
posted while its message depends on work that this process has not enqueued yet. Otherwise GPUs can
deadlock: a receive of NCCL is a kernel that runs on the GPU until the message arrives. With lazy
loading, CUDA loads a kernel at its first launch: it takes the lock of the context, and waits until
the GPU has finished all earlier kernels. So the process would wait for the message, and the message
for the work that the process launches next. The rule holds on every backend. Sources: CUDA
programming guide, "Lazy Loading"; meta-pytorch/torchcomms, #2334 and #2470, on GitHub.

Two neighbours that wait in this way at the same time can still block each other. Therefore
`Engine.warm_up` loads the kernels of a step before the first receive.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from comm.communicator import PeerLostError
from monitor.out_of_memory import is_out_of_memory
from monitor.profiling.tracer import NO_TRACER, Tracer, Track
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.p2p import AHEAD, StageLink
from pipeline_parallel.schedule.schedules import Action, Kind, Schedule, forward_only
from pipeline_parallel.schedule.validate import BACKWARD_BEGINS, check_schedule
from pipeline_parallel.stage import Stage

FORWARDS = (Kind.FORWARD,)


class Losses(NamedTuple):
    """The sum of token losses of each microbatch, and the number of trained tokens in the batch.

    Only the last stage has losses. On other stages the list is empty, and the number is 0.
    """

    of_microbatches: list[float]
    num_trained_tokens: int

    @property
    def total(self) -> float:
        return sum(self.of_microbatches)


class StageError(RuntimeError):
    """An error in a stage; the text names stage, action, microbatch and the last received shape."""


class StageMemoryError(StageError):
    """An out-of-memory error in a stage; the text also has the number of microbatches in flight."""


class Engine:
    """The engine of this process's stage; it runs batches of `num_microbatches` microbatches.

    Args:
        stage: computes forward and backward.
        link: exchanges messages with the neighbouring stages.
        schedule: yields the actions of a stage in order.
        num_microbatches: the number of microbatches in a pipeline's batch.
        tracer: records how long actions take.

    Raises:
        ValueError: the schedule cannot run.
    """

    def __init__(
        self,
        stage: Stage,
        link: StageLink,
        *,
        schedule: Schedule,
        num_microbatches: int,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        index, num_stages = link.stage, link.num_stages
        check_schedule(schedule, num_stages, num_microbatches)
        self._stage, self._link = stage, link
        self._num_microbatches, self.tracer = num_microbatches, tracer
        self._train = list(schedule(index, num_stages, num_microbatches))
        self._evaluate = list(forward_only(index, num_stages, num_microbatches))
        neighbours = max(0, index - 1), min(index + 1, num_stages - 1)
        before, after = (list(schedule(s, num_stages, num_microbatches)) for s in neighbours)
        # A neighbour sends a message after it has received this many messages of this stage. So
        # this stage may post the receive when it has sent as many, and when the message arrives,
        # these sends are complete. Work of other stages adds no condition: it depends on this stage
        # only through the neighbour, which has run its earlier actions.
        self._gradients_arrived = _arrived(before, BACKWARD_BEGINS, with_=FORWARDS)
        self._activations_arrived = _arrived(after, FORWARDS, with_=BACKWARD_BEGINS)
        self._not_finite: list[int] | None = None
        self._runs: dict[Kind, Callable[[int, PipelineBatch], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.INPUT_GRADIENT: self._backward,
            Kind.WEIGHT_GRADIENT: self._weight_gradient,
        }
        self._losses: list[Tensor] = []
        self._loss_scale = 1.0
        self._last_received = torch.Size(), torch.float32

    def train(self, batch: PipelineBatch, *, loss_scale: float) -> Losses:
        """Runs forward and backward of a batch; returns the losses of the batch.

        Backward computes the gradients of (sum of the token losses) * `loss_scale`, and adds them
        to the gradient buffer of the stage.
        """
        self._loss_scale = loss_scale
        batch.place_documents(self._link.spec.device)
        self._link.expect(
            activations=list(self._gradients_arrived.values()),
            gradients=list(self._activations_arrived.values()),
        )
        for action in self._train:
            self._run(action, self._runs[action.kind], batch)
        return self._finish(batch)

    def evaluate(self, batch: PipelineBatch) -> Losses:
        """Runs only forward of a batch, without dropout; returns the losses of the batch."""
        batch.place_documents(self._link.spec.device)
        self._link.expect(activations=[0] * self._num_microbatches, gradients=())
        for action in self._evaluate:
            self._run(action, self._evaluate_one, batch)
        return self._finish(batch)

    def find_not_finite(self, batch: PipelineBatch) -> list[int]:
        """Returns the microbatches whose activations become NaN or infinite in this stage.

        Such a microbatch has a finite input and an output that is not finite.
        """
        self._not_finite = []
        self.evaluate(batch)
        microbatches, self._not_finite = self._not_finite, None
        return microbatches

    def warm_up(self, batch: PipelineBatch) -> None:
        """Runs every computation of a step on the first microbatch of `batch`; sends no messages.

        Zeros take the place of messages. The gradients are added to the gradient buffer, and the
        caller must set it to zero. No update may have begun, so the buffer does not count this
        microbatch.
        """
        token_ids, labels = batch.token_ids(0), batch.labels(0)
        x = self._link.spec.zeros() if token_ids is None else token_ids
        gradient = self._link.spec.zeros() if labels is None else None
        keys, documents = batch.keys(0), batch.documents(0, x.device)
        self._stage.evaluate(x, labels, documents=documents)
        self._stage.forward(0, x, labels, keys, loss_scale=1.0, documents=documents)
        self._stage.backward(0, gradient)
        if any(action.kind is Kind.WEIGHT_GRADIENT for action in self._train):
            self._stage.weight_gradient(0)

    def _finish(self, batch: PipelineBatch) -> Losses:
        self._link.flush()
        losses = torch.stack(self._losses).tolist() if self._losses else []
        self._losses.clear()
        return Losses(losses, batch.num_trained_tokens())

    def _run(
        self, action: Action, run: Callable[[int, PipelineBatch], None], batch: PipelineBatch
    ) -> None:
        try:
            run(action.microbatch, batch)
        except PeerLostError:
            raise
        except Exception as error:
            shape, dtype = self._last_received
            kind, microbatch = action.kind.name.lower().replace("_", " "), action.microbatch
            place = f"stage {self._link.stage}, {kind} of microbatch {microbatch}"
            received = f"last received: {tuple(shape)} {dtype}"
            if is_out_of_memory(error):
                others = len(self._stage.in_flight - {microbatch})
                raise StageMemoryError(
                    f"{place}, with {others} others in flight; {received}"
                ) from error
            raise StageError(f"{place}; {received}") from error

    def _forward(self, microbatch: int, batch: PipelineBatch) -> None:
        labels = batch.labels(microbatch)
        x = self._input(microbatch, batch)
        self._link.resolve(gradients=self._gradients_arrived[microbatch])
        keys, documents = batch.keys(microbatch), batch.documents(microbatch, x.device)
        with self.tracer.span(Track.FORWARD_COMPUTE, microbatch=microbatch):
            out = self._stage.forward(
                microbatch, x, labels, keys, loss_scale=self._loss_scale, documents=documents
            )
        self._output(out, is_loss=labels is not None)

    def _evaluate_one(self, microbatch: int, batch: PipelineBatch) -> None:
        labels = batch.labels(microbatch)
        x = self._input(microbatch, batch)
        self._link.resolve(activations=microbatch - AHEAD)
        documents = batch.documents(microbatch, x.device)
        out = self._stage.evaluate(x, labels, documents=documents)
        if self._not_finite is not None and x.isfinite().all() and not out.isfinite().all():
            self._not_finite.append(microbatch)
        self._output(out, is_loss=labels is not None)

    def _input(self, microbatch: int, batch: PipelineBatch) -> Tensor:
        received = self._link.receive_activation()
        x = batch.token_ids(microbatch) if received is None else received
        assert x is not None, "the first stage has token ids"
        self._last_received = x.shape, x.dtype
        return x

    def _output(self, out: Tensor, *, is_loss: bool) -> None:
        if is_loss:
            self._losses.append(out)
        else:
            self._link.send_activation(out)

    def _backward(self, microbatch: int, batch: PipelineBatch) -> None:
        gradient = self._link.receive_gradient()
        if gradient is not None:
            self._last_received = gradient.shape, gradient.dtype
            self._link.resolve(activations=self._activations_arrived[microbatch])
        with self.tracer.span(Track.BACKWARD_COMPUTE, microbatch=microbatch):
            input_gradient = self._stage.backward(microbatch, gradient)
        self._link.send_gradient(input_gradient)

    def _weight_gradient(self, microbatch: int, batch: PipelineBatch) -> None:
        with self.tracer.span(Track.WEIGHT_GRADIENT, microbatch=microbatch):
            self._stage.weight_gradient(microbatch)


def _arrived(
    neighbour: Sequence[Action], receiving: Collection[Kind], *, with_: Collection[Kind]
) -> dict[int, int]:
    """Returns how many sends to a neighbour are complete when a message from it arrives.

    The neighbour sends one message to this stage for each microbatch. The result maps the
    microbatch to the number of messages that the neighbour receives from this stage before it sends
    this message. The messages are in the order in which the neighbour sends them.

    Args:
        neighbour: the actions of the neighbour, in order.
        receiving: the kinds of actions that begin with a message from this stage.
        with_: the kinds of actions that end with a message to this stage.
    """
    arrived, count = {}, 0
    for action in neighbour:
        count += action.kind in receiving
        if action.kind in with_:
            arrived[action.microbatch] = count
    return arrived
