"""Tests the estimates of --check-cluster against numbers calculated by hand."""

from typing import Any

import pytest

from comm.rendezvous.participants import Participant
from comm.topology import Topology
from modules.model_sizes import ModelSizes, ModuleWork
from pipeline_parallel.partition.split import Split
from planning.cluster.estimate import Estimate, RunShape
from planning.cluster.link_probe import Link, LinkSpeed, links
from planning.cluster.machines import MachineFacts, differences
from planning.cluster.report import about_clocks, advice, link_table

# Per token, a block has 10 multiply-adds and the head 20; a microbatch has 5 tokens.
MODEL = ModelSizes(
    layers=4, hidden=2, inner=3, vocabulary=7, block_weights=28, heads=1, head_size=2
)
PLAN = RunShape(
    MODEL, ModuleWork(10, 20), Split((3, 1)), "gpipe", False, 1, 1, tokens=5, message=1000
)
FAST, SLOW = LinkSpeed(0.0, 1000, 0.001), LinkSpeed(1.0, 1000, 4.0)


def estimate(
    replicas: int, slow: set[Link] | None = None, rates: dict[int, float] | None = None, **plan: Any
) -> Estimate:
    topology = Topology(0, 2, replicas)
    return Estimate(
        RunShape(**{**vars(PLAN), **plan}),
        topology,
        rates=[(rates or {}).get(rank, 50.0) for rank in range(2 * replicas)],
        links={k: SLOW if k in (slow or set()) else FAST for k in links(topology)},
    )


def test_an_iteration_is_the_pipelines_products_and_messages() -> None:
    """An iteration takes the time of a microbatch's matmuls and messages, in forward and backward.

    At 50 multiply-adds per second, a block's forward takes 1 s and its backward 2 s. The head takes
    2 + 4 = 6 s in forward, because it computes its gradients there. So stage 0 takes 3 s in forward
    and 6 s in backward; stage 1 takes 1 + 6 = 7 s in forward and 2 s in backward. A message takes
    0.001 s.
    """
    assert estimate(1).iteration_with_free_links == pytest.approx(3 + 7 + 2 + 6)
    assert estimate(1).iteration == pytest.approx(3 + 0.001 + 7 + 2 + 0.001 + 6)
    onwards, back = Link("pipeline", 0, 1), Link("pipeline", 1, 0)
    assert estimate(1, {onwards}).iteration == pytest.approx(18 + 4 + 0.001)
    assert estimate(1, {onwards}).slowest_link == onwards
    assert estimate(1, {onwards}).compute_seconds(onwards) == pytest.approx(7)
    assert estimate(1, {back}).slowest_link == back
    assert estimate(1, {back}).compute_seconds(back) == pytest.approx(6)


def test_the_slowest_pipeline_and_replica_count() -> None:
    slow = estimate(2, rates={3: 5.0})
    assert slow.iteration_with_free_links == pytest.approx(3 + 70 + 20 + 6)
    assert slow.speeds == [50.0, 5.0]
    assert slow.stage_seconds(Split((3, 1))) == pytest.approx(5 * 30 / 5)
    assert slow.balanced_layers() == (3, 1)
    assert estimate(2, rates={0: 5.0}).balanced_layers() == (1, 3)


def test_what_replicas_exchange() -> None:
    """Replicas exchange 28 gradients for each block, and 2 x 7 = 14 for embedding or head."""
    slow = Link("replicas", 3, 1)
    found = estimate(2, {slow}, {}, message=1)
    assert PLAN.gradient_bytes(0) == 4 * (3 * 28 + 14)
    assert PLAN.gradient_bytes(1) == 4 * (28 + 14)
    exchanged = found.exchange(1)
    assert exchanged is not None
    seconds, link = exchanged
    assert seconds == pytest.approx(1 + 3 * 168 / 1000), "2 (R - 1) / R = 1 of it"
    assert link == slow
    assert estimate(1).exchange(0) is None


ROSTER = [Participant(r, f"h{r // 2}", "127.0.0.1", "lo", 1, {}) for r in range(4)]


def test_links_that_cost_little_are_told_so() -> None:
    told = "\n".join(advice(estimate(1), ROSTER, precision="fp32"))
    assert "takes at least 18 s for matmuls and messages; with free links 18 s" in told
    assert "the links make an iteration 0% longer" in told
    assert "expect iterations" not in told
    assert "--num-layers 3,1 is even enough for devices as fast as measured" in told
    assert "devices differ" not in told


def test_a_slow_link_between_machines() -> None:
    slow = {Link("pipeline", 1, 0)}
    found = estimate(1, slow, rates={0: 500.0, 1: 500.0})
    apart = [ROSTER[0], ROSTER[2]]
    told = "\n".join(advice(found, apart, precision="bf16"))
    assert "stage 1 -> stage 0 of pipeline 0 (rank 2 (h1) -> rank 0 (h0)): 250 bytes/s" in told
    assert "the 1.0 kB of each microbatch's gradients take 4 s there" in told
    assert "while stage 0 computes 600 ms on them: expect iterations 3.2 times as long" in told
    assert "both stages on one machine" in told
    assert "--bf16" not in told, "--bf16 is already set"


def test_a_table_tells_by_what_a_slow_link_was_measured() -> None:
    link = Link("pipeline", 0, 1)
    header, row = link_table(ROSTER, {link: SLOW}, {link: 3000}).splitlines()
    assert header.split() == ["link", "of", "latency", "message", "takes", "rate"]
    assert row.endswith("pipeline  1 s      3.0 kB   10 s (by 1.0 kB)  250 bytes/s")


def test_clocks_that_may_be_right_are_not_told_of() -> None:
    told = list(about_clocks(ROSTER, [(0, 0), (-1.5, 0.2), (1.5, 0.6), (0.9, 0.0)]))
    (line,) = told
    assert line.startswith(
        "the clock of rank 1 (host h0) is 1.5 s behind rank 0's: do not compare "
    )


def machine(**changes: Any) -> MachineFacts:
    files: dict[str, str | None] = {"x.pt": "5 bytes"}
    same = MachineFacts("", None, [], {"torch": "2"}, {"a": "1"}, files, damage=[], resumes=False)
    return same._replace(**changes)


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        ({}, []),
        ({"versions": {"torch": "3"}}, ["torch is 3 on rank 1 (host h0), but 2 on the others"]),
        ({"config": {}}, []),
        (
            {"config": {"a": "1", "b": "2"}},
            ["config.json: b is 2 on rank 1 (host h0), but not there on the others"],
        ),
        ({"files": {"y.pt": "7 bytes"}}, []),
        ({"files": {"x.pt": None}}, ["rank 1 (host h0) has no x.pt in --model-name"]),
        ({"files": {"x.pt": None}, "resumes": True}, []),
        (
            {"files": {"x.pt": "6 bytes"}},
            ["x.pt is 6 bytes on rank 1 (host h0), but 5 bytes on the others"],
        ),
        ({"damage": ["x.pt: cut"]}, ["rank 1 (host h0): x.pt: cut"]),
        ({"damage": ["x.pt: cut"], "resumes": True}, []),
        ({"problems": ["--x: no"]}, ["rank 1 (host h0): --x: no"]),
    ],
)
def test_differences_are_named_once(odd: dict[str, Any], told: list[str]) -> None:
    """Each difference between machines, and each problem of a machine, is reported in one line.

    Different lists of shards are no difference, because each stage needs its own. Before a
    resume, missing or damaged shards are no problem.
    """
    machines = [machine(), machine(**odd), machine(), machine()]
    assert differences(ROSTER, machines) == told
