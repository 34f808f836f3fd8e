"""Tests messages, microbatches in flight and failures of the pipeline engine, with test doubles."""

from functools import cache, partial
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor, nn

from comm.communicator import PeerLostError
from modules.layers.dropout import KeyedDropout
from modules.layers.selective import MODES, Recompute
from pipeline_parallel.engine import StageError
from pipeline_parallel.microbatch import PipelineBatch
from pipeline_parallel.schedule.schedules import SCHEDULES, gpipe, splits_backward, zero_bubble_h1
from pipeline_parallel.schedule.validate import peak_in_flight
from pipeline_parallel.stage import Stage
from tests.support.gradients import gradients_of
from tests.support.memory import peak_bytes
from tests.support.pipeline_doubles import NotedCommunicator
from tests.support.schedule_tables import IN_FLIGHT
from tests.support.stages import (
    HIDDEN,
    ROWS,
    TOKENS,
    VOCABULARY,
    make_engine,
    make_model,
    make_stage,
)

# ---- messages ----


def test_gpipes_first_stage_runs_all_forwards_before_the_second_begins() -> None:
    """gpipe's first stage sends all 8 microbatches before it posts or waits for any receive."""
    communicator = NotedCommunicator(0, 2)
    communicator.at_receive = Mock(side_effect=PeerLostError)
    engine = make_engine(gpipe, communicator, num_microbatches=8)
    with pytest.raises(PeerLostError):
        engine.train(batch(8, first=True), loss_scale=1.0)
    before = communicator.events[: communicator.events.index("wait for receive from 1")]
    assert before == ["send to 1"] * 8 + ["receive from 1"] * 2


def batch(count: int, *, first: bool = False, last: bool = False) -> PipelineBatch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCABULARY, (count * ROWS, TOKENS), generator=generator)
    keys = range(count * ROWS)
    return PipelineBatch(tokens if first else None, tokens if last else None, keys, ROWS)


# ---- microbatches in flight ----

P, M = 4, 16


@pytest.mark.parametrize("recompute", MODES.values())
@pytest.mark.parametrize("stage_index", range(P))
@pytest.mark.parametrize("mode", SCHEDULES)
def test_microbatches_in_flight_are_those_of_the_schedule(
    mode: str, stage_index: int, recompute: Recompute
) -> None:
    communicator = NotedCommunicator(stage_index, P)
    stage = make_stage(communicator, schedule=SCHEDULES[mode], recompute=recompute)
    in_flight: list[int] = []
    noted: Any = NotedStage(stage, in_flight)
    count = 2 * P
    engine = make_engine(SCHEDULES[mode], communicator, num_microbatches=count, stage=noted)
    rows = batch(count, first=stage_index == 0, last=stage_index == P - 1)
    engine.train(rows, loss_scale=1.0)
    expected = IN_FLIGHT[mode](stage_index, P, count)
    assert max(in_flight) == peak_in_flight(SCHEDULES[mode], stage_index, P, count) == expected
    assert in_flight[-1] == 0


class NotedStage:
    """A stage that records the number of microbatches in flight after each call."""

    def __init__(self, stage: Any, in_flight: list[int]) -> None:
        self._stage, self._in_flight = stage, in_flight

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._stage, name)

        def noted(*args: Any, **options: Any) -> Any:
            out = call(*args, **options)
            self._in_flight.append(len(self._stage.in_flight))
            return out

        return noted


@cache
def peak_of(mode: str, stage_index: int, num_microbatches: int, *, recompute: Recompute) -> int:
    communicator = NotedCommunicator(stage_index, P)
    engine = make_engine(
        SCHEDULES[mode], communicator, num_microbatches=num_microbatches, recompute=recompute
    )
    rows = batch(num_microbatches, first=stage_index == 0, last=stage_index == P - 1)
    engine.train(rows, loss_scale=1.0)  # allocates everything that is made only once
    return peak_bytes(lambda: engine.train(rows, loss_scale=1.0))[1]


ACTIVATION = 4 * ROWS * TOKENS * HIDDEN  # bytes


@pytest.mark.parametrize(
    ("stage_index", "recompute"), [(0, "none"), (P - 1, "none"), (1, "selective"), (1, "full")]
)
def test_memory_falls_with_the_microbatches_held(stage_index: int, recompute: Recompute) -> None:
    """1f1b with 16 microbatches needs no more memory than gpipe with P - stage microbatches.

    1f1b has at most P - stage microbatches in flight. The test allows four more activations,
    because two messages are received ahead in each direction.
    """
    gpipe_of = partial(peak_of, "gpipe", stage_index, recompute=recompute)
    held = P - stage_index
    of_one = gpipe_of(num_microbatches=5) - gpipe_of(num_microbatches=4)
    assert gpipe_of(num_microbatches=M) >= M * of_one > 0
    found = peak_of("1f1b", stage_index, M, recompute=recompute)
    assert held * of_one < found <= gpipe_of(num_microbatches=held) + 4 * ACTIVATION


@pytest.mark.parametrize("stage_index", [0, P - 1])
def test_weight_gradients_that_wait_cost_little_memory(stage_index: int) -> None:
    """zb-h1 with 16 microbatches needs little more memory than gpipe with 4 microbatches.

    Between input gradient (I) and weight gradient (W) of a microbatch, a layer holds the inputs and
    output gradients of four matmuls; together, these have the size of 16 activations. Before I, the
    layer holds 12.5 activations. So the two layers of a stage hold 2 x 3.5 = 7 activations more for
    the current microbatch, and 7 for each of the `stage_index` microbatches that wait for W. The
    last stage also holds the gradients of its logits.
    """
    found = peak_of("zb-h1", stage_index, M, recompute="none")
    as_many = peak_of("gpipe", stage_index, P, recompute="none")
    waiting = 7 * (stage_index + 1) * ACTIVATION
    logits = 4 * ROWS * (TOKENS - 1) * VOCABULARY * P if stage_index == P - 1 else 0
    assert found <= as_many + waiting + logits + 4 * ACTIVATION
    assert found < peak_of("gpipe", stage_index, M, recompute="none") / 2


def test_backward_runs_in_the_thread_that_calls_it() -> None:
    """On a GPU, autograd's own thread would launch kernels beside the engine's thread.

    No GPU is here, so the test reads the switch that autograd obeys. Outside of backward the switch
    has torch's default.
    """
    stage = make_stage(NotedCommunicator(1, 3), schedule=gpipe, recompute="none")
    x, seen = torch.randn(ROWS, TOKENS, HIDDEN), list[bool]()
    stage.forward(0, x, None, None, loss_scale=1.0)
    x.register_hook(lambda gradient: seen.append(torch._C._is_multithreading_enabled()))
    stage.backward(0, torch.ones(ROWS, TOKENS, HIDDEN))
    assert [*seen, torch._C._is_multithreading_enabled()] == [False, True]


# ---- warm-up ----


@pytest.mark.parametrize("recompute", MODES.values())
@pytest.mark.parametrize("stage_index", range(3))
@pytest.mark.parametrize("mode", SCHEDULES)
def test_a_warm_up_leaves_no_trace(mode: str, stage_index: int, recompute: Recompute) -> None:
    """The next iteration has the same bits, and exchanges its buckets once, at the same time."""
    cold, warm = (
        iteration_of(mode, stage_index, recompute=recompute, warm=warm) for warm in (False, True)
    )
    assert warm == cold


def iteration_of(mode: str, stage_index: int, *, recompute: Recompute, warm: bool) -> list[Any]:
    """Returns gradients, losses, operations and the last message of an iteration with dropout."""
    schedule, pipeline, replicas = (
        SCHEDULES[mode],
        NotedCommunicator(stage_index, 3),
        NotedCommunicator(0, 2),
    )
    model, splits = make_model(stage_index, 3), splits_backward(schedule, stage_index, 3)
    for module in model.modules():
        if isinstance(module, KeyedDropout):
            module.p = 0.1
    gradients = gradients_of(model, replicas)
    flat = gradients.buffer.flat
    stage = Stage(model, recompute=recompute, gradients=gradients.buffer, splits=splits)
    noted: Any = Mock(wraps=stage)
    engine = make_engine(schedule, pipeline, num_microbatches=4, stage=noted)
    rows = batch(4, first=stage_index == 0, last=stage_index == 2)
    if warm:
        before = torch.get_rng_state()
        engine.warm_up(rows)
        calls = ["evaluate", "forward", "backward"] + ["weight_gradient"] * splits
        assert [call[0] for call in noted.method_calls] == calls
        assert torch.equal(torch.get_rng_state(), before)
        assert pipeline.events == replicas.events == []
        assert stage.in_flight == set()
        assert flat.any() == (stage_index == 2)  # other stages have a gradient of zeros
        gradients.buffer.zero_()
    torch.manual_seed(1)  # received messages are random numbers
    gradients.begin_update(4)
    losses = engine.train(rows, loss_scale=1.0)
    gradients.finish_exchange()
    assert flat.any()
    return [flat.tolist(), losses, pipeline.events, pipeline.last_sent.tolist(), replicas.events]


# ---- failures ----


@pytest.mark.parametrize("mode", SCHEDULES)
def test_a_failure_in_backward_names_stage_microbatch_action_and_shape(mode: str) -> None:
    """If a backward fails, the error names stage, microbatch, action and last received shape."""
    communicator = NotedCommunicator(1, 3)
    model = make_model(1, 3)
    cause, seen = ValueError("no such thing"), list[Tensor]()

    def note(module: nn.Module, args: object, out: Tensor) -> None:
        seen.append(out)
        if len(seen) == 4:
            out.register_hook(Mock(side_effect=cause))

    model[0].register_forward_hook(note)
    stage = make_stage(communicator, schedule=SCHEDULES[mode], recompute="none", model=model)
    engine = make_engine(SCHEDULES[mode], communicator, num_microbatches=6, stage=stage)
    with pytest.raises(StageError) as caught:
        engine.train(batch(6), loss_scale=1.0)
    assert caught.value.__cause__ is cause
    action = "input gradient" if splits_backward(SCHEDULES[mode], 1, 3) else "backward"
    assert str(caught.value) == (
        f"stage 1, {action} of microbatch 3; last received: "
        f"({ROWS}, {TOKENS}, {HIDDEN}) torch.float32"
    )


def test_a_failure_of_a_weight_gradient_is_named() -> None:
    communicator = NotedCommunicator(1, 2)
    stage = make_stage(communicator, schedule=zero_bubble_h1, recompute="none")
    engine = make_engine(zero_bubble_h1, communicator, num_microbatches=3, stage=stage)
    with (
        patch.object(stage, "weight_gradient", side_effect=MemoryError),
        pytest.raises(StageError, match="stage 1, weight gradient of microbatch 0") as caught,
    ):
        engine.train(batch(3, last=True), loss_scale=1.0)
    assert isinstance(caught.value.__cause__, MemoryError)


def test_a_failure_on_token_ids_has_their_shape() -> None:
    engine = make_engine(gpipe, NotedCommunicator(0, 2), num_microbatches=1)
    tokens = torch.full((ROWS, TOKENS), 10**6)
    with pytest.raises(StageError) as caught:
        engine.train(PipelineBatch(tokens, None, range(ROWS), ROWS), loss_scale=1.0)
    assert str(caught.value).endswith(f"received: ({ROWS}, {TOKENS}) torch.int64")
    assert isinstance(caught.value.__cause__, IndexError)


def test_a_lost_peer_is_not_the_stages_failure() -> None:
    communicator = NotedCommunicator(0, 2)
    lost = PeerLostError("pipeline receive from rank 1: gone")
    communicator.at_receive = Mock(side_effect=lost)
    engine = make_engine(gpipe, communicator, num_microbatches=2)
    with pytest.raises(PeerLostError) as caught:
        engine.train(batch(2, first=True), loss_scale=1.0)
    assert caught.value is lost
    assert caught.value.__cause__ is None


def test_the_last_stage_puts_off_the_weight_gradients_of_its_head_too() -> None:
    """With zb-h1, `weight_gradient`, not `backward`, computes the output projection's gradient."""
    stage: Any = make_stage(NotedCommunicator(1, 2), schedule=zero_bubble_h1, recompute="none")
    (name,) = (n for n in stage._gradients.views if n.endswith("embed_out.weight"))
    gradient = stage._gradients.views[name]
    labels = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    stage.forward(0, torch.randn(ROWS, TOKENS, HIDDEN), labels, None, loss_scale=1.0)
    stage.backward(0, None)
    assert not gradient.any()
    stage.weight_gradient(0)
    assert gradient.any()
