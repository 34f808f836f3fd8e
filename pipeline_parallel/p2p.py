"""The two neighbours of a stage: activations go to the next, gradients to the previous.

Receives are posted ahead of need, so that messages travel while the stage computes; sends do not
wait. At a pipeline's ends there is no neighbour: the channel returns at once, so that nobody else
asks which stage this is.
"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from comm.communicator import Communicator, Work
from monitor.profiling.tracer import NO_TRACER, Tracer, Track

AHEAD = 2  # receives under way in each direction: one to use next, one on its way meanwhile

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

Shape = tuple[int, int, int]  # rows, tokens, hidden


class StageLink:
    """Messages of one shape and type between neighbouring stages.

    `shape` is that of a microbatch's activations; gradients have the same. Raises ValueError, on
    both sides, where a neighbour has another shape or type. `tracer` is told what receiving and
    sending take the host.
    """

    def __init__(
        self,
        pipeline: Communicator,
        *,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        prev = pipeline.rank - 1 if pipeline.rank > 0 else None
        following = pipeline.rank + 1 if pipeline.rank + 1 < pipeline.size else None
        self._shape, self._dtype = shape, dtype
        _check_alike(pipeline, shape, dtype, device)
        self._activations = _Line(
            pipeline,
            prev,
            following,
            shape,
            dtype,
            device,
            tracer,
            Track.FORWARD_RECV,
            Track.FORWARD_SEND,
        )
        self._gradients = _Line(
            pipeline,
            following,
            prev,
            shape,
            dtype,
            device,
            tracer,
            Track.BACKWARD_RECV,
            Track.BACKWARD_SEND,
        )

    def expect(self, *, activations: int, gradients: int) -> None:
        """Starts an iteration in which so many messages come of each kind."""
        self._activations.expect(activations)
        self._gradients.expect(gradients)

    def receive_activation(self) -> Tensor | None:
        """What the previous stage sent next; None on the first stage."""
        return self._activations.receive()

    def receive_gradient(self) -> Tensor | None:
        """What the next stage sent next; None on the last stage."""
        return self._gradients.receive()

    def send_activation(self, activation: Tensor) -> None:
        """Starts sending to the next stage; nothing on the last."""
        self._activations.send(self._checked(activation))

    def send_gradient(self, gradient: Tensor | None) -> None:
        """Starts sending to the previous stage; nothing on the first."""
        if self._gradients.has_receiver:
            self._gradients.send(self._checked(gradient))

    def settle(self, *, activations: int = 0, gradients: int = 0) -> None:
        """Lets go of what was sent: so many messages of an iteration are known to have arrived."""
        self._activations.settle(activations)
        self._gradients.settle(gradients)

    def flush(self) -> None:
        """Waits until everything sent has left."""
        self._activations.flush()
        self._gradients.flush()

    def _checked(self, tensor: Tensor | None) -> Tensor:
        if tensor is None or tensor.shape != self._shape or tensor.dtype != self._dtype:
            found = "nothing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise RuntimeError(f"to send: {found}, but the channel has {self._shape} {self._dtype}")
        return tensor.contiguous()


class _Line:
    """One direction: messages come from `source` and go to `to`, either of which may be None.

    Those of an iteration are counted from 0, as its microbatches are.
    """

    def __init__(
        self,
        pipeline: Communicator,
        source: int | None,
        to: int | None,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        tracer: Tracer,
        receives: Track,
        sends: Track,
    ) -> None:
        self._pipeline, self._source, self._to = pipeline, source, to
        self._shape, self._dtype, self._device = shape, dtype, device
        self._tracer, self._receives, self._sends = tracer, receives, sends
        self._to_post = 0
        self._posted: deque[tuple[Tensor, Work]] = deque()
        self._sent: deque[Work] = deque()
        self._num_received = self._num_settled = 0

    @property
    def has_receiver(self) -> bool:
        return self._to is not None

    def expect(self, count: int) -> None:
        self._to_post, self._num_received, self._num_settled = count, 0, 0
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

    def send(self, tensor: Tensor) -> None:
        if self._to is None:
            return
        with self._tracer.span(self._sends, microbatch=self._num_settled + len(self._sent)):
            self._sent.append(self._pipeline.send(tensor, to=self._to))

    def settle(self, count: int) -> None:
        while self._sent and self._num_settled < count:
            with self._tracer.span(self._sends, microbatch=self._num_settled):
                self._sent.popleft().wait()
            self._num_settled += 1

    def flush(self) -> None:
        assert not self._posted, "an iteration receives all that it expected"
        self.settle(self._num_settled + len(self._sent))

    def _post(self) -> None:
        if self._source is None or self._to_post == 0:
            return
        self._to_post -= 1
        tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._posted.append((tensor, self._pipeline.receive(tensor, source=self._source)))


def _check_alike(
    pipeline: Communicator, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises ValueError where the stages would send each other different things."""
    mine = torch.tensor([*shape, DTYPES.index(dtype)], device=device)
    for stage, found in enumerate(pipeline.all_gather(mine).tolist()):
        if found != mine.tolist():
            raise ValueError(
                f"stage {pipeline.rank} has activations (rows, tokens, hidden) of {shape} in "
                f"{dtype}, but stage {stage} of {tuple(found[:3])} in {DTYPES[found[3]]}: "
                "--micro-batch-size, --seq-length, --embedding-dim, --fp16 and --bf16 must be the "
                "same on all ranks"
            )
