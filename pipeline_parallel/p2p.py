"""Messages between neighbours: activations to the next stage, gradients to the previous stage.

Receives are posted early, so messages travel while the stage computes. But a receive whose message
depends on later work of this stage is not posted before this work, because it could block the stage
(see `pipeline_parallel.engine`). Sends do not wait. The first and the last stage have only one
neighbour. Methods for the missing neighbour do nothing and return at once, so the engine runs the
same code on every stage.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from comm.communicator import Communicator, Work
from comm.topology import Topology
from common.tensors import DTYPES
from monitor.profiling.tracer import NO_TRACER, Tracer, Track

AHEAD = 2  # the most receives that are posted in each direction: for the next two messages

_DTYPES = list(DTYPES.values())


class MessageSpec(NamedTuple):
    """The shape (rows, seq_len, hidden), type and device of all messages of a pipeline."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """Returns an uninitialised tensor that can receive a message."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def zeros(self) -> Tensor:
        """Returns a message of zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


def check_message_specs(control: Communicator, topology: Topology, spec: MessageSpec) -> None:
    """Checks that all processes send messages of one shape and type; every process calls it.

    The processes compare the shapes over `control`, the group of all processes. So the pipeline's
    communicator needs no collective operation.

    Raises:
        ValueError: the shapes or types differ. All processes raise it.
    """
    own = [*spec.shape, _DTYPES.index(spec.dtype)]
    for rank, row in enumerate(control.all_gather(torch.tensor(own)).tolist()):
        if row != own:
            raise ValueError(
                f"{topology.describe(topology.rank)} has activations (rows, tokens, hidden) of "
                f"{spec.shape} in {spec.dtype}, but {topology.describe(rank)} has "
                f"{tuple(row[:3])} in {_DTYPES[row[3]]}: --micro-batch-size, --seq-length, "
                "--embedding-dim, --fp16 and --bf16 must be the same on all ranks"
            )


class StageLink:
    """The connection of a stage with its neighbours, for activations and gradients.

    `stage` is the index of the stage in the pipeline, and `num_stages` is the number of stages.

    Args:
        pipeline: the processes of the pipeline, in the order of their stages.
        spec: the activations of a microbatch, and their gradients; the same on all stages (see
            `check_message_specs`).
        tracer: records how long sends and receives block the host.
    """

    def __init__(
        self, pipeline: Communicator, spec: MessageSpec, *, tracer: Tracer = NO_TRACER
    ) -> None:
        self.stage, self.num_stages, self.spec = pipeline.rank, pipeline.size, spec
        previous = self.stage - 1 if self.stage > 0 else None
        following = self.stage + 1 if self.stage + 1 < self.num_stages else None
        forward = (Track.FORWARD_RECV, Track.FORWARD_SEND)
        backward = (Track.BACKWARD_RECV, Track.BACKWARD_SEND)
        self._activations = _Direction(pipeline, previous, following, spec, tracer, forward)
        self._gradients = _Direction(pipeline, following, previous, spec, tracer, backward)

    def expect(self, *, activations: Sequence[int], gradients: Sequence[int]) -> None:
        """Begins an iteration, and posts the receives that are permitted already.

        Args:
            activations: for each activation that this stage will receive, in order: the number of
                gradients that this stage must send before the receive may be posted.
            gradients: the same for each gradient that this stage will receive, with the number of
                activations.
        """
        self._activations.expect(activations)
        self._gradients.expect(gradients)
        self._post()

    def receive_activation(self) -> Tensor | None:
        """Returns the next activation from the previous stage; None on the first stage."""
        activation = self._activations.receive()
        self._post()
        return activation

    def receive_gradient(self) -> Tensor | None:
        """Returns the next gradient from the next stage; None on the last stage."""
        gradient = self._gradients.receive()
        self._post()
        return gradient

    def send_activation(self, activation: Tensor) -> None:
        """Starts to send `activation` to the next stage; does nothing on the last stage."""
        self._activations.send(activation)
        self._post()

    def send_gradient(self, gradient: Tensor | None) -> None:
        """Starts to send `gradient` to the previous stage; does nothing on the first stage."""
        self._gradients.send(gradient)
        self._post()

    def resolve(self, *, activations: int = 0, gradients: int = 0) -> None:
        """Waits until the given numbers of sends are complete, and frees the sent tensors.

        `activations` and `gradients` are these numbers, counted from the start of the iteration. In
        training, the engine counts only messages that the neighbours have received already, so the
        wait is short.
        """
        self._activations.resolve(activations)
        self._gradients.resolve(gradients)

    def flush(self) -> None:
        """Waits until all sends are complete."""
        self._activations.flush()
        self._gradients.flush()

    def _post(self) -> None:
        """Posts every receive that is permitted now; each call of the engine may permit one."""
        self._activations.post(self._gradients.num_sent)
        self._gradients.post(self._activations.num_sent)


class _Direction:
    """Messages in one direction: from rank `source` to this stage, and from this stage to `to`.

    `source` or `to` is None if there is no such neighbour. In each iteration the messages are
    numbered from 0, as the microbatches are.
    """

    def __init__(
        self,
        pipeline: Communicator,
        source: int | None,
        to: int | None,
        spec: MessageSpec,
        tracer: Tracer,
        tracks: tuple[Track, Track],
    ) -> None:
        self._pipeline, self._source, self._to, self._spec = pipeline, source, to, spec
        self._tracer, (self._receives, self._sends) = tracer, tracks
        self._not_posted: deque[int] = deque()  # for each receive, the sends that come before it
        self._posted: deque[tuple[Tensor, Work]] = deque()
        self._sent: deque[Work] = deque()
        self._num_received = self._num_resolved = 0

    @property
    def num_sent(self) -> int:
        """The number of messages that this stage has sent in the iteration."""
        return self._num_resolved + len(self._sent)

    def expect(self, not_posted: Sequence[int]) -> None:
        self._not_posted = deque(() if self._source is None else not_posted)
        self._num_received = self._num_resolved = 0

    def post(self, num_sent: int) -> None:
        """Posts permitted receives; this stage has sent `num_sent` messages to `source`."""
        if self._source is None:
            return
        while self._not_posted and self._not_posted[0] <= num_sent and len(self._posted) < AHEAD:
            self._not_posted.popleft()
            tensor = self._spec.empty()
            self._posted.append((tensor, self._pipeline.receive(tensor, source=self._source)))

    def receive(self) -> Tensor | None:
        if self._source is None:
            return None
        assert self._posted, "a message that depends on a later send of this stage is a deadlock"
        with self._tracer.span(self._receives, microbatch=self._num_received):
            tensor, work = self._posted.popleft()
            work.wait()
        self._num_received += 1
        return tensor

    def send(self, tensor: Tensor | None) -> None:
        if self._to is None:
            return
        shape, dtype, _ = self._spec
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            actual = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise RuntimeError(f"the message to send is {actual}, expected {shape} {dtype}")
        with self._tracer.span(self._sends, microbatch=self.num_sent):
            self._sent.append(self._pipeline.send(tensor.contiguous(), to=self._to))

    def resolve(self, count: int) -> None:
        while self._sent and self._num_resolved < count:
            with self._tracer.span(self._sends, microbatch=self._num_resolved):
                self._sent.popleft().wait()
            self._num_resolved += 1

    def flush(self) -> None:
        num_left = len(self._posted) + len(self._not_posted)
        assert num_left == 0, "an iteration receives all messages that it expects"
        self.resolve(self.num_sent)
