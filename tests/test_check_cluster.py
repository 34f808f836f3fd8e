"""--check-cluster: what four real processes tell of themselves, each other and their links.

Once as users start it, and once over channels and devices in which something is slow or another: a
sleep in one channel's send, a rate, a version or a clock that one rank alone has.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from arguments import parse_train
from comm.communicator import Communicator, Work
from comm.fabric import Fabric
from dist_clm_train import _facts
from tests.bad_input import argv, right
from tests.comm.ranks import Rank as Entered
from tests.comm.ranks import enter
from tests.dist import run_ranks
from tests.entry import Outcome, Rank, Run, quiet_port, run_all
from tests.tiny import make_hf
from training_cluster import check_cluster
from training_cluster_machines import versions

HOST = socket.gethostname()
SHARDS = ["pytorch_embs.pt", *(f"pytorch_{i}.pt" for i in range(8)), "pytorch_lm_head.pt"]
SLEEP = 0.05


def make_model(folder: Path, **changes: Any) -> Path:
    """config.json of 8 layers, and shards that cannot be read: nothing is in them."""
    make_hf("gptneox", vocab_size=400, num_hidden_layers=8).config.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for name in SHARDS:
        (folder / name).touch()
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    make_model(folder / "m")
    other = make_model(folder / "other", layer_norm_eps=0.125)
    (other / "pytorch_7.pt").unlink()
    (other / "pytorch_6.pt").write_text("longer")
    for name in ("token", "other token"):
        (folder / name).write_text(f"a secret that is long: {name}")
    (folder / "token").chmod(0o600)
    return folder


def flags(home: Path, **more: Any) -> dict[str, Any]:
    """A run's flags; its data is not there."""
    return {
        **right(home), "num-layers": 4, "task-name": home / "none.jsonl",
        "checkpoint-path": home / "none", "check-cluster": "true", **more,
    }  # fmt: skip


def ranks(home: Path, odd: dict[str, Any], **more: Any) -> list[Rank]:
    """The four of a run, with `odd` flags on the last."""
    common = flags(home, **{"dist-url": f"tcp://127.0.0.1:{quiet_port()}", **more})
    return [
        Rank(argv({**common, "rank": rank, **(odd if rank == 3 else {})}), home)
        for rank in range(4)
    ]


@pytest.fixture(scope="module")
def outcomes(home: Path) -> dict[str, list[Outcome]]:
    runs = [
        Run("missing", ranks(
            home, {"job-token-file": home / "other token"},
            **{"job-token-file": home / "token", "join-timeout": 12},
        )),
        Run("fine", ranks(home, {})),
        Run("another model", ranks(home, {"model-name": home / "other"})),
        Run("another flag", ranks(home, {"seq-length": 16})),
        Run("no model", ranks(home, {"model-name": home / "nowhere"})),
    ]  # fmt: skip
    return run_all([[run] for run in runs], at_once=3, deadline=200.0)


def test_ranks_that_agree(home: Path, outcomes: dict[str, list[Outcome]]) -> None:
    first, *others = outcomes["fine"]
    assert [one.status for one in (first, *others)] == [0] * 4, first
    assert [one.stdout + one.stderr for one in others] == [""] * 3
    lines = first.stdout.splitlines()
    rows = [re.split("  +", line) for line in lines if "lo (127.0.0.1)" in line]
    assert [row[:5] for row in rows] == [
        [str(rank), str(rank % 2), str(rank // 2), HOST, "lo (127.0.0.1)"] for rank in range(4)
    ]
    assert all("1 thread" in row[5] for row in rows)
    assert all(row[7].endswith(" GFLOP/s") and row[8].endswith(" forwards/s") for row in rows)
    pattern = rf"rank (\d) \({re.escape(HOST)}\) -> rank (\d) .*  (pipeline|replicas)  .*/s$"
    found = [match.groups() for line in lines if (match := re.match(pattern, line))]
    assert found == [
        ("0", "1", "pipeline"), ("1", "0", "pipeline"),
        ("2", "3", "pipeline"), ("3", "2", "pipeline"),
        ("0", "2", "replicas"), ("2", "0", "replicas"),
        ("1", "3", "replicas"), ("3", "1", "replicas"),
    ]  # fmt: skip
    assert any(f", torch {torch.__version__}, " in line for line in lines)
    assert "check passed: all ranks agree" in lines[-1]
    assert any("2 microbatches per pipeline, gpipe, --num-layers 4,4" in line for line in lines)
    assert not (home / "none").exists(), "nothing is written"


def test_another_model_on_one_rank(outcomes: dict[str, list[Outcome]]) -> None:
    first = outcomes["another model"][0]
    assert [one.status for one in outcomes["another model"]] == [1] * 4
    told = first.stdout.splitlines()
    who = f"rank 3 (host {HOST})"
    assert f"- config.json: layer_norm_eps is 0.125 on {who}, but 1e-05 on the others" in told
    assert (
        f"- pytorch_6.pt is 6 bytes on {who}, but 0 bytes on rank 1 (host {HOST})" in told
    ) or f"- pytorch_6.pt is 0 bytes on rank 1 (host {HOST}), but 6 bytes on {who}" in told
    assert f"- {who} has no pytorch_7.pt in --model-name" in told
    assert told[-1] == "check failed: differing or missing, told above: 3"


def test_no_model_on_one_rank(outcomes: dict[str, list[Outcome]]) -> None:
    """The others' config.json says what to measure."""
    told = outcomes["no model"][0].stdout
    assert [one.status for one in outcomes["no model"]] == [1] * 4
    assert re.search(r"- rank 3 \(host .*\): --model-name \S*nowhere: no such folder\n", told)
    assert "an iteration (" in told


def test_another_flag_on_one_rank(outcomes: dict[str, list[Outcome]]) -> None:
    for one in outcomes["another flag"]:
        assert one.status == 2
        assert "--seq-length must be the same on all ranks" in one.stderr


def test_a_missing_rank_is_named_while_the_others_wait(
    outcomes: dict[str, list[Outcome]],
) -> None:
    """The last rank has another job's token: it goes, and counts as missing."""
    *waiting, other = outcomes["missing"]
    for one in waiting:
        assert one.status == 1
        assert "waiting for rank 3 (10 s of 12 s)" in one.stdout
        assert "rank 3 did not join" in one.stderr
    who = f"rank 3 (host {HOST})"
    assert f"{who} came with another --job-id or --job-token-file" in waiting[0].stdout
    assert other.status == 2
    assert f"is not that of {who}" in other.stderr
    assert other.seconds < waiting[0].seconds
    assert "other token: other users may read it" in other.stdout
    for one in outcomes["missing"]:
        assert "a secret" not in one.stdout + one.stderr


def test_what_a_rank_tells_of_its_flags_names_no_job(home: Path) -> None:
    more = {"job-id": "a secret", "job-token-file": home / "token"}
    told = _facts(parse_train(argv(flags(home, **more)), {}))
    assert told["--seq-length"] == 24
    assert not [flag for flag in told if flag.startswith("--job")]


# ---- what is slow, or another, on one rank ----


class Throttled:
    """A channel in which long messages to one member take longer."""

    def __init__(self, group: Communicator, *, to: int) -> None:
        self._group, self._to = group, to

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)

    def send(self, tensor: Tensor, *, to: int) -> Work:
        if to == self._to and tensor.nbytes > 1000:
            time.sleep(SLEEP)
        return self._group.send(tensor, to=to)


def throttle(fabric: Fabric, name: str, *, to: int) -> Fabric:
    groups: dict[str, Any] = {"pipeline": fabric.pipeline, "replicas": fabric.replicas}
    groups[name] = Throttled(groups[name], to=to)
    return Fabric(control=fabric.control, **groups)


class _Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()


@contextmanager
def listening() -> Iterator[list[str]]:
    told, root = _Told(), logging.getLogger()
    root.setLevel(logging.INFO)
    root.addHandler(told)
    yield told.lines
    root.removeHandler(told)


def check_cases(rank: int, world_size: int, url: str, home: Path) -> dict[str, Any]:
    """Every case's status and what this rank told."""
    torch.set_num_threads(1)
    entered = enter(rank, url, num_stages=2, num_replicas=2)
    found = {}
    for name, odd in CASES.items():
        more = {"load-pretrained-model": "false", "rank": rank}
        args = parse_train(argv(flags(home, **more)), {})
        fabric = entered.fabric
        with ExitStack() as stack, listening() as lines:
            rate = 1e7 if name == "a slow device" and rank == 3 else 1e9
            stack.enter_context(patch("training_cluster.product_rate", return_value=rate))
            if rank == odd:
                fabric = make_odd(name, fabric, stack)
            status = check_cluster(
                args, topology=entered.topology, rendezvous=entered.rendezvous, fabric=fabric,
                device=torch.device("cpu"),
            )  # fmt: skip
        found[name] = (status, lines)
    close(entered)
    return found


def close(entered: Entered) -> None:
    entered.fabric.close()
    entered.watch.close()


# The rank on which it is so.
CASES = {
    "nothing": None,
    "a slow pipeline": 2,
    "slow replicas": 3,
    "a slow device": 3,
    "another version": 2,
    "another clock": 2,
}


def make_odd(name: str, fabric: Fabric, stack: ExitStack) -> Fabric:
    if name == "a slow pipeline":
        return throttle(fabric, "pipeline", to=1)
    if name == "slow replicas":
        return throttle(fabric, "replicas", to=0)
    if name == "another version":
        stack.enter_context(patch(
            "training_cluster_machines.versions",
            lambda args, device: {**versions(args, device), "torch": "0.1"},
        ))  # fmt: skip
    if name == "another clock":
        ahead = SimpleNamespace(time_ns=lambda: time.time_ns() + 100 * 10**9)
        stack.enter_context(patch("training_cluster.time", ahead))
    return fabric


@pytest.fixture(scope="module")
def found(home: Path) -> dict[str, tuple[int, list[str]]]:
    by_rank = run_ranks(4, check_cases, home)
    for name in CASES:
        assert len({found[name][0] for found in by_rank}) == 1, "one status on all ranks"
        assert not any(found[name][1] for found in by_rank[1:]), "rank 0 alone tells"
    first: dict[str, tuple[int, list[str]]] = by_rank[0]
    return first


Found = dict[str, tuple[int, list[str]]]


def the(lines: list[str], text: str) -> str:
    (line,) = [line for line in lines if text in line]
    return line


def seconds(text: str) -> float:
    number, unit = text.split()
    return float(number) / (1 if unit == "s" else 1000)


def test_a_slow_link_is_named_with_what_steps_become(found: Found) -> None:
    """The two microbatches of a step compute for less than the 50 ms that each message takes."""
    status, lines = found["a slow pipeline"]
    assert status == 0, "speed alone stops no run"
    line = the(lines, "the pipelines' slowest link")
    ends = f"rank 2 ({HOST}) -> rank 3 ({HOST})"
    assert f"is stage 0 -> stage 1 of pipeline 1 ({ends}): " in line
    assert "each microbatch's activations take" in line
    assert "times as long as with free links; --bf16 or --fp16 halves the messages" in line
    took = re.search(r"takes at least (\S+ m?s) of", the(lines, "an iteration ("))
    before = re.search(r"takes at least (\S+ m?s) of", the(found["nothing"][1], "an iteration ("))
    assert took
    assert before
    assert seconds(took[1]) > SLEEP
    assert seconds(took[1]) > 5 * seconds(before[1])


def test_slow_replicas_are_named(found: Found) -> None:
    line = the(found["slow replicas"][1], "exchange")
    assert "the replicas of stage 1 exchange" in line
    assert f"(rank 3 ({HOST}) -> rank 1 ({HOST}): " in line
    assert "--gradient-accumulate-step" in line


def test_a_slow_device_gets_fewer_layers(found: Found) -> None:
    """A hundredth of the others' speed leaves stage 1 one layer of eight, beside the head."""
    line = the(found["a slow device"][1], "--num-layers 7,1")
    assert "--num-layers 7,1 is more even than 4,4" in line
    line = the(found["a slow device"][1], "- devices differ: ")
    assert f"0.02 GFLOP/s on rank 3 ({HOST}), but 2 GFLOP/s on rank 0 ({HOST});" in line


def test_another_version_is_named(found: Found) -> None:
    status, lines = found["another version"]
    assert status == 1
    expected = f"- torch is 0.1 on rank 2 (host {HOST}), but {torch.__version__} on the others"
    assert expected in lines
    assert lines[-1] == "check failed: differing or missing, told above: 1"


def test_another_clock_is_named(found: Found) -> None:
    status, lines = found["another clock"]
    assert status == 0
    line = the(lines, "- the clock of")
    assert line.startswith(f"- the clock of rank 2 (host {HOST}) is 100.0 s ahead of rank 0's")
    assert not [line for line in found["nothing"][1] if "the clock of" in line]
