"""Messages between a stage and its neighbours: activations to the next, gradients to the previous.

Receives are posted ahead of need, so that messages travel while the stage computes; sends do not
wait. At a pipeline's ends there is no neighbour: methods return at once, so that the engine does
not branch on the stage.
"""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from comm.communicator import Communicator, Work
from common.tensors import DTYPES
from monitor.profiling.tracer import NO_TRACER, Tracer, Track

AHEAD = 2  # receives in flight in each direction: the next one to use, and the one after it

_DTYPES = list(DTYPES.values())


class MessageSpec(NamedTuple):
    """The shape (rows, seq_len, hidden), type and device of all messages of a pipeline."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """Returns a tensor for a message to come."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class StageLink:
    """The messages of a stage with its neighbours.

    `stage` and `num_stages` are the stage's place in its pipeline.

    Args:
        pipeline: the processes of the pipeline, in the order of their stages.
        shape: of a microbatch's activations, (rows, seq_len, hidden); gradients have the same.
        dtype: their type.
        device: their device.
        tracer: records how long sends and receives keep the host.

    Raises:
        ValueError: a neighbour has another shape or type; raised by both.
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
        """Begins an iteration that receives so many messages of each kind."""
        self._activations.expect(activations)
        self._gradients.expect(gradients)

    def receive_activation(self) -> Tensor | None:
        """Returns the next activation from the previous stage; None on the first stage."""
        return self._activations.receive()

    def receive_gradient(self) -> Tensor | None:
        """Returns the next gradient from the next stage; None on the last stage."""
        return self._gradients.receive()

    def send_activation(self, activation: Tensor) -> None:
        """Starts a send to the next stage; does nothing on the last."""
        self._activations.send(activation)

    def send_gradient(self, gradient: Tensor | None) -> None:
        """Starts a send to the previous stage; does nothing on the first."""
        self._gradients.send(gradient)

    def resolve(self, *, activations: int = 0, gradients: int = 0) -> None:
        """Waits for the iteration's first sends, so many of each kind, and drops their tensors.

        The neighbours are known to have received them, so the wait is short.
        """
        self._activations.resolve(activations)
        self._gradients.resolve(gradients)

    def flush(self) -> None:
        """Waits for all sends."""
        self._activations.flush()
        self._gradients.flush()


class _Direction:
    """Messages from `source` to this stage and from it to `to`; either may be None.

    The messages of an iteration are counted from 0, as its microbatches are.
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
            raise RuntimeError(f"to send: {actual}, but messages have {shape} {dtype}")
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
    """Raises ValueError where the stages' messages differ."""
    own = torch.tensor([*spec.shape, _DTYPES.index(spec.dtype)], device=spec.device)
    for stage, other in enumerate(pipeline.all_gather(own).tolist()):
        if other != own.tolist():
            raise ValueError(
                f"stage {pipeline.rank} has activations (rows, tokens, hidden) of {spec.shape} in "
                f"{spec.dtype}, but stage {stage} of {tuple(other[:3])} in {_DTYPES[other[3]]}: "
                "--micro-batch-size, --seq-length, --embedding-dim, --fp16 and --bf16 must be the "
                "same on all ranks"
            )
