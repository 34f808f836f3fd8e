"""Tests --check-cluster when one of four ranks is slow or differs from the other ranks.

A patch slows the sends of that one rank, lowers its measured matmul rate, or changes its torch
version or its clock. In one more case, a shard on the disk that all ranks share is too short.
"""

import re
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from torch import Tensor

from arguments.train import parse_train
from checkpoint.files.checksums import FileSum
from checkpoint.files.layer_shards import write_shard_manifest
from comm.communicator import Communicator, Work
from comm.process_groups import ProcessGroups
from comm.run_context import RunContext
from planning.cluster.check import check_cluster
from planning.cluster.machines import versions
from tests.support.cases import LogLines
from tests.support.cluster import SHARDS, flags, make_model
from tests.support.connected import enter
from tests.support.launcher import run_ranks
from tests.support.valid_run import argv

HOST = socket.gethostname()
SLEEP = 0.05
CUT = "pytorch_6.pt"


class Throttled:
    """A communicator whose long messages to one rank take SLEEP seconds longer."""

    def __init__(self, group: Communicator, *, to: int) -> None:
        self._group, self._to = group, to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, tensor: Tensor, *, to: int) -> Work:
        if to == self._to and tensor.nbytes > 1000:
            time.sleep(SLEEP)
        return self._group.send(tensor, to=to)


def throttle(groups: ProcessGroups, name: str, *, to: int) -> ProcessGroups:
    throttled: dict[str, Any] = {"pipeline": groups.pipeline, "replicas": groups.replicas}
    throttled[name] = Throttled(throttled[name], to=to)
    return ProcessGroups(control=groups.control, **throttled)


def check_cases(rank: int, world_size: int, url: str, home: Path) -> dict[str, Any]:
    """Runs every case; returns each case's exit status and the lines that this rank reports."""
    torch.set_num_threads(1)
    entered = enter(rank, url, num_stages=2, num_replicas=2)
    found = {}
    for name, odd in CASES.items():
        more: dict[str, Any] = {"load-pretrained-model": "false", "rank": rank}
        if name == "a cut shard":  # all ranks read the same disk
            more |= {"model-name": home / "cut", "load-pretrained-model": "true"}
        args = parse_train(argv(flags(home, **more)), {})
        groups = entered.groups
        with ExitStack() as stack, LogLines() as log:
            rate = 1e7 if name == "a slow device" and rank == 3 else 1e9
            stack.enter_context(patch("planning.cluster.check.block_rate", return_value=rate))
            if rank == odd:
                groups = make_odd(name, groups, stack)
            context = RunContext(
                entered.topology, groups, torch.device("cpu"), entered.rendezvous.nonce
            )
            status = check_cluster(args, context, entered.rendezvous)
        found[name] = (status, "\n".join(log.lines).splitlines())
    entered.close()
    return found


# Each case, and the rank that is slow or different.
CASES = {
    "nothing": None,
    "a slow pipeline": 2,
    "slow replicas": 3,
    "a slow device": 3,
    "another version": 2,
    "another clock": 2,
    "a cut shard": None,
}


def make_odd(name: str, groups: ProcessGroups, stack: ExitStack) -> ProcessGroups:
    if name == "a slow pipeline":
        return throttle(groups, "pipeline", to=1)
    if name == "slow replicas":
        return throttle(groups, "replicas", to=0)
    if name == "another version":
        theirs = Mock(side_effect=lambda *args: {**versions(*args), "torch": "0.1"})
        stack.enter_context(patch("planning.cluster.machines.versions", theirs))
    if name == "another clock":
        ahead = SimpleNamespace(time_ns=lambda: time.time_ns() + 100 * 10**9)
        stack.enter_context(patch("planning.cluster.check.time", ahead))
    return groups


Found = dict[str, tuple[int, list[str]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    home = tmp_path_factory.mktemp("cluster")
    make_model(home / "m")
    cut = make_model(home / "cut")
    write_shard_manifest(cut, {name: FileSum(6 * (name == CUT), "00000000") for name in SHARDS})
    (cut / CUT).write_text("short")
    by_rank = run_ranks(4, check_cases, home)
    for name in CASES:
        assert len({found[name][0] for found in by_rank}) == 1, "one status on all ranks"
        assert not any(found[name][1] for found in by_rank[1:]), "only rank 0 reports"
    return by_rank[0]


def the(lines: list[str], text: str) -> str:
    (line,) = [line for line in lines if text in line]
    return line


def seconds(lines: list[str]) -> float:
    """Returns how many seconds an iteration takes, according to the report."""
    took = re.search(r"takes at least (\S+) (m?s) for", the(lines, "an iteration ("))
    assert took
    return float(took[1]) / {"s": 1, "ms": 1000}[took[2]]


def test_a_slow_link_is_named_with_what_steps_become(found: Found) -> None:
    """The report names a link whose messages take 50 ms, and says how much it slows iterations."""
    status, lines = found["a slow pipeline"]
    assert status == 0, "a slow link alone is no failure"
    line = the(lines, "the pipelines' slowest link")
    ends = f"rank 2 ({HOST}) -> rank 3 ({HOST})"
    assert f"is stage 0 -> stage 1 of pipeline 1 ({ends}): " in line
    assert "each microbatch's activations take" in line
    assert "times as long as with free links; --bf16 or --fp16 halves the messages" in line
    assert seconds(lines) >= 2 * SLEEP


def test_slow_replicas_are_named(found: Found) -> None:
    line = the(found["slow replicas"][1], "exchange")
    assert "the replicas of stage 1 exchange" in line
    assert f"(rank 3 ({HOST}) -> rank 1 ({HOST}): " in line
    assert "--gradient-accumulate-step" in line


def test_a_slow_device_gets_fewer_layers(found: Found) -> None:
    """If rank 3 is 100 times slower, the report advises to put one layer of eight on its stage."""
    line = the(found["a slow device"][1], "--num-layers 7,1")
    assert "--num-layers 7,1 is more even than 4,4" in line
    line = the(found["a slow device"][1], "- devices differ: ")
    assert f"0.02 GFLOP/s on rank 3 ({HOST}), but 2 GFLOP/s on rank 0 ({HOST});" in line


def test_another_version_is_named(found: Found) -> None:
    status, lines = found["another version"]
    assert status == 1
    assert f"- torch is 0.1 on rank 2 (host {HOST}), but {torch.__version__} on the others" in lines
    assert lines[-1] == "check failed: differences and missing items, listed above: 1"


def test_another_clock_is_named(found: Found) -> None:
    status, lines = found["another clock"]
    assert status == 0
    line = the(lines, "- the clock of")
    assert line.startswith(f"- the clock of rank 2 (host {HOST}) is 100.0 s ahead of rank 0's")
    assert not [line for line in found["nothing"][1] if "the clock of" in line]


def test_a_cut_shard_is_named_by_all_whose_stage_reads_it(found: Found) -> None:
    """The report names ranks 1 and 3, which both read a shard shorter than the manifest says."""
    status, lines = found["a cut shard"]
    assert status == 1
    told = [line for line in lines if CUT in line]
    assert len(told) == 2
    for line, rank in zip(told, (1, 3), strict=True):
        assert line.startswith(f"- rank {rank} (host {HOST}): ")
        assert f"cut/{CUT}: damaged: 5 bytes, manifest.json says 6; convert" in line
    assert lines[-1] == "check failed: differences and missing items, listed above: 2"
