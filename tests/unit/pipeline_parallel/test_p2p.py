"""Tests messages between stages: early receives, sends that do not block, and wrong shapes.

`test_posting.py` tests in which order the engine lets a link post its receives.
"""

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from comm.objects import gather_json
from comm.topology import Topology
from pipeline_parallel.p2p import MessageSpec, StageLink, check_message_specs
from tests.support.connected import Rank, enter
from tests.support.launcher import run_ranks
from tests.support.pipeline_doubles import NotedCommunicator

SHAPE = (2, 5, 8)
SPEC = MessageSpec(SHAPE, torch.float32, torch.device("cpu"))
AT_ONCE = [0] * 12  # receives that may be posted before this stage sends any message


def make_link(communicator: Any, spec: MessageSpec = SPEC) -> StageLink:
    return StageLink(communicator, spec)


def test_receives_are_posted_ahead() -> None:
    """A link keeps two receives posted in each direction, or fewer if it expects fewer messages."""
    communicator = NotedCommunicator(1, 3)
    link = make_link(communicator)
    link.expect(activations=AT_ONCE[:4], gradients=AT_ONCE[:1])
    assert communicator.events == ["receive from 0"] * 2 + ["receive from 2"]
    under_way = []
    for _ in range(4):
        link.receive_activation()
        events = communicator.events
        under_way.append(events.count("receive from 0") - events.count("wait for receive from 0"))
    assert under_way == [2, 2, 1, 0]
    link.receive_gradient()
    link.flush()
    link.expect(activations=AT_ONCE[:1], gradients=())
    assert communicator.events[-1] == "receive from 0"


def test_a_receive_is_posted_as_soon_as_the_stage_has_sent_enough() -> None:
    """A send of the other direction permits receives; sends of the same direction permit none."""
    communicator = NotedCommunicator(1, 3)
    link = make_link(communicator)
    link.expect(activations=[0, 1, 1, 2], gradients=[1, 3])
    posted = []
    for step in (
        lambda: None,
        lambda: link.send_gradient(torch.ones(SHAPE)),  # two activations may be posted
        lambda: link.receive_activation(),
        lambda: link.send_activation(torch.ones(SHAPE)),  # the first gradient
        lambda: link.send_activation(torch.ones(SHAPE)),
        lambda: link.receive_activation(),  # the last activation waits for a second gradient
        lambda: link.send_gradient(torch.ones(SHAPE)),
        lambda: link.send_activation(torch.ones(SHAPE)),  # the second gradient
    ):
        step()
        events = communicator.events
        posted.append((events.count("receive from 0"), events.count("receive from 2")))
    assert posted == [(1, 0), (2, 0), (3, 0), (3, 1), (3, 1), (3, 1), (4, 1), (4, 2)]


def test_a_message_that_depends_on_a_later_send_is_not_waited_for() -> None:
    """A wrong table would hang the run; the link raises an error instead."""
    link = make_link(NotedCommunicator(1, 3))
    link.expect(activations=[0, 1], gradients=())
    link.receive_activation()
    with pytest.raises(AssertionError, match="is a deadlock"):
        link.receive_activation()


def test_received_tensors_are_each_ones_own() -> None:
    link = make_link(NotedCommunicator(1, 2))
    link.expect(activations=AT_ONCE[:3], gradients=())
    received = [link.receive_activation() for _ in range(3)]
    assert all(one is not None and one.shape == SHAPE for one in received)
    assert len({one.data_ptr() for one in received if one is not None}) == 3


def test_sends_are_waited_for_where_they_are_resolved() -> None:
    communicator = NotedCommunicator(1, 3)
    link = make_link(communicator)
    link.expect(activations=(), gradients=())
    for _ in range(3):
        link.send_activation(torch.ones(SHAPE))
    link.send_gradient(torch.ones(SHAPE))
    waits = [event for event in communicator.events if event.startswith("wait")]
    assert waits == []
    for resolved, expected in ((2, 2), (1, 2), (2, 2), (3, 3), (9, 3)):
        link.resolve(activations=resolved)
        assert communicator.events.count("wait for send to 2") == expected
    assert communicator.events.count("wait for send to 0") == 0
    link.flush()
    assert communicator.events.count("wait for send to 0") == 1
    assert communicator.events.count("wait for send to 2") == 3


def test_ends_have_no_neighbour() -> None:
    for rank in (0, 1):
        communicator = NotedCommunicator(rank, 2)
        link = make_link(communicator)
        link.expect(activations=AT_ONCE[:2], gradients=AT_ONCE[:2])
        assert communicator.events == [f"receive from {1 - rank}"] * 2
        first, last = link.receive_activation(), link.receive_gradient()
        assert (first is None, last is None) == (rank == 0, rank == 1)
        link.send_activation(torch.ones(SHAPE))
        link.send_gradient(torch.ones(SHAPE))
        assert [e for e in communicator.events if e.startswith("send")] == [f"send to {1 - rank}"]
    alone = make_link(NotedCommunicator(0, 1))
    alone.expect(activations=AT_ONCE[:2], gradients=AT_ONCE[:2])
    alone.send_gradient(None)
    assert alone.receive_activation() is alone.receive_gradient() is None
    alone.flush()


@pytest.mark.parametrize(
    "wrong", [torch.ones(2, 5, 7), torch.ones(2, 5, 8, dtype=torch.float16), torch.ones(10, 8)]
)
def test_a_message_of_another_shape_is_not_sent(wrong: torch.Tensor) -> None:
    link = make_link(NotedCommunicator(0, 2))
    with pytest.raises(RuntimeError, match=r"expected \(2, 5, 8\) torch\.float32"):
        link.send_activation(wrong)


def test_a_tensor_that_is_not_contiguous_is_sent_as_it_looks() -> None:
    communicator = NotedCommunicator(0, 2)
    tensor = torch.randn(2, 8, 5).transpose(1, 2)
    make_link(communicator).send_activation(tensor)
    assert torch.equal(communicator.last_sent, tensor)


# ---- two processes ----

COUNT = 12
LARGE = (1, 1024, 1024)  # 4 MB: more than a socket's buffers
OTHERS = {
    "rows": SPEC._replace(shape=(1, 5, 8)),
    "tokens": SPEC._replace(shape=(2, 6, 8)),
    "hidden": SPEC._replace(shape=(2, 5, 4)),
    "same size": SPEC._replace(shape=(2, 8, 5)),
    "fp16": SPEC._replace(dtype=torch.float16),
    "bf16": SPEC._replace(dtype=torch.bfloat16),
}


def two_ranks(rank: int, world_size: int, url: str) -> dict[str, Any]:
    joined = enter(rank, url, num_stages=2, num_replicas=1)
    try:
        pipeline, control = joined.groups.pipeline, joined.groups.control
        told: dict[str, Any] = {"same": refusal_of(joined, SPEC)}
        for name, other in OTHERS.items():
            told[name] = refusal_of(joined, other if rank == 1 else SPEC)
        both_half = (OTHERS["fp16"], OTHERS["bf16"])[rank]
        told["fp16, bf16"] = refusal_of(joined, both_half)
        link = make_link(pipeline, SPEC._replace(shape=LARGE))
        link.expect(activations=() if rank == 0 else AT_ONCE[:COUNT], gradients=())
        if rank == 0:
            for number in range(COUNT):
                link.send_activation(torch.full(LARGE, float(number)))
        gather_json(control, "all are under way")  # only then the peer starts to receive
        if rank == 1:
            received = [link.receive_activation() for _ in range(COUNT)]
            told["received"] = [one.unique().tolist() for one in received if one is not None]
        link.flush()
        return told
    finally:
        joined.close()


def refusal_of(joined: Rank, spec: MessageSpec) -> str:
    try:
        check_message_specs(joined.groups.control, joined.topology, spec)
    except ValueError as error:
        return str(error)
    return "none"


@pytest.fixture(scope="module")
def told() -> list[dict[str, Any]]:
    return run_ranks(2, two_ranks, deadline=60.0)


@pytest.mark.parametrize("name", [*OTHERS, "fp16, bf16"])
def test_neighbours_that_differ_are_told_so_on_both_sides(
    name: str, told: list[dict[str, Any]]
) -> None:
    both = [f"{OTHERS.get(name, SPEC).shape}", f"{SHAPE}"]
    for rank, one in enumerate(told):
        message = one[name]
        places = [f"rank {stage} (stage {stage}, replica 0) has" for stage in (rank, 1 - rank)]
        assert message.startswith(f"{places[0]} activations"), message
        assert f"but {places[1]} (" in message
        assert all(text in message for text in both)
        for flag in ("--micro-batch-size", "--seq-length", "--embedding-dim", "--fp16", "--bf16"):
            assert flag in message
        assert "\n" not in message
    if "16" in name:
        assert all("float16" in one[name] for one in told)


def test_neighbours_that_agree_are_not_refused(told: list[dict[str, Any]]) -> None:
    assert [one["same"] for one in told] == ["none", "none"]


def test_a_pipeline_that_differs_from_another_is_named_with_its_replica() -> None:
    """The check covers all replicas, because all processes take part in it."""
    rows = torch.tensor([[2, 5, 8, 0], [2, 5, 8, 0], [2, 6, 8, 0], [2, 5, 8, 0]])
    control = Mock(all_gather=Mock(return_value=rows))
    with pytest.raises(ValueError, match=r"replica 1\) has activations .*, but rank 2 \(stage 0"):
        check_message_specs(control, Topology(3, num_stages=2, num_replicas=2), SPEC)


def test_sends_end_no_sooner_than_they_must(told: list[dict[str, Any]]) -> None:
    """A stage begins 12 sends of 4 MB before its neighbour receives any; all arrive in order."""
    assert told[1]["received"] == [[float(number)] for number in range(COUNT)]
