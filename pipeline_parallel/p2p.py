"""Messages between neighbours: activations to the next stage, gradients to the previous stage.

Receives are posted early, so messages travel while the stage computes. Sends do not wait. The first
and the last stage have only one neighbour. Methods for the missing neighbour do nothing and return
at once, so the engine runs the same code on every stage.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from comm.communicator import Communicator, Work
from common.tensors import DTYPES
from monitor.profiling.tracer import NO_TRACER, Tracer, Track

AHEAD = 2  # receives that are posted in each direction: for the next two messages

_DTYPES = list(DTYPES.values())


class MessageSpec(NamedTuple):
    """The shape (rows, seq_len, hidden), type and device of all messages of a pipeline."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """Returns an uninitialised tensor that can receive a message."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class StageLink:
    """The connection of a stage with its neighbours, for activations and gradients.

    `stage` is the index of the stage in the pipeline, and `num_stages` is the number of stages.

    Args:
        pipeline: the processes of the pipeline, in the order of their stages.
        shape: the shape of a microbatch's activations and of their gradients, (rows, seq_len,
            hidden).
        dtype: the type of activations and gradients.
        device: the device of activations and gradients.
        tracer: records how long sends and receives block the host.

    Raises:
        ValueError: the stages of the pipeline have different shapes or types. All stages raise it.
    """

    def __init__(
        self,
        pipeline: Communicator,
        *,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.stage, self.num_stages = pipeline.rank, pipeline.size
        previous = self.stage - 1 if self.stage > 0 else None
        following = self.stage + 1 if self.stage + 1 < self.num_stages else None
        spec = MessageSpec(shape, dtype, device)
        _check_alike(pipeline, spec)
        forward = (Track.FORWARD_RECV, Track.FORWARD_SEND)
        backward = (Track.BACKWARD_RECV, Track.BACKWARD_SEND)
        self._activations = _Direction(pipeline, previous, following, spec, tracer, forward)
        self._gradients = _Direction(pipeline, following, previous, spec, tracer, backward)

    def expect(self, *, activations: int, gradients: int) -> None:
        """Begins an iteration, in which this stage receives the given numbers of messages."""
        self._activations.expect(activations)
        self._gradients.expect(gradients)

    def receive_activation(self) -> Tensor | None:
        """Returns the next activation from the previous stage; None on the first stage."""
        return self._activations.receive()

    def receive_gradient(self) -> Tensor | None:
        """Returns the next gradient from the next stage; None on the last stage."""
        return self._gradients.receive()

    def send_activation(self, activation: Tensor) -> None:
        """Starts to send `activation` to the next stage; does nothing on the last stage."""
        self._activations.send(activation)

    def send_gradient(self, gradient: Tensor | None) -> None:
        """Starts to send `gradient` to the previous stage; does nothing on the first stage."""
        self._gradients.send(gradient)

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
        self._num_to_post = 0
        self._posted: deque[tuple[Tensor, Work]] = deque()
        self._sent: deque[Work] = deque()
        self._num_received = self._num_resolved = 0

    def expect(self, count: int) -> None:
        self._num_to_post, self._num_received, self._num_resolved = count, 0, 0
        for _ in range(AHEAD):
            self._post()

    def receive(self) -> Tensor | None:
        if self._source is None:
            return None
        with self._tracer.span(self._receives, microbatch=self._num_received):
            tensor, work = self._posted.popleft()
            work.wait()
        self._num_received += 1
        self._post()
        return tensor

    def send(self, tensor: Tensor | None) -> None:
        if self._to is None:
            return
        shape, dtype, _ = self._spec
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            actual = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise RuntimeError(f"the message to send is {actual}, expected {shape} {dtype}")
        with self._tracer.span(self._sends, microbatch=self._num_resolved + len(self._sent)):
            self._sent.append(self._pipeline.send(tensor.contiguous(), to=self._to))

    def resolve(self, count: int) -> None:
        while self._sent and self._num_resolved < count:
            with self._tracer.span(self._sends, microbatch=self._num_resolved):
                self._sent.popleft().wait()
            self._num_resolved += 1

    def flush(self) -> None:
        assert not self._posted, "an iteration receives all messages that it expects"
        self.resolve(self._num_resolved + len(self._sent))

    def _post(self) -> None:
        if self._source is None or self._num_to_post == 0:
            return
        self._num_to_post -= 1
        tensor = self._spec.empty()
        self._posted.append((tensor, self._pipeline.receive(tensor, source=self._source)))


def _check_alike(pipeline: Communicator, spec: MessageSpec) -> None:
    """Raises ValueError if the stages' messages differ in shape or type."""
    own = torch.tensor([*spec.shape, _DTYPES.index(spec.dtype)], device=spec.device)
    for stage, other in enumerate(pipeline.all_gather(own).tolist()):
        if other != own.tolist():
            raise ValueError(
                f"stage {pipeline.rank} has activations (rows, tokens, hidden) of {spec.shape} in "
                f"{spec.dtype}, but stage {stage} has {tuple(other[:3])} in {_DTYPES[other[3]]}: "
                "--micro-batch-size, --seq-length, --embedding-dim, --fp16 and --bf16 must be the "
                "same on all ranks"
            )
