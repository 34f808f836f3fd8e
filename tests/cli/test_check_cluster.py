"""Tests --check-cluster with four real processes; in most tests, a flag of rank 3 differs."""

import re
import socket
from itertools import permutations
from pathlib import Path

import pytest
import torch

from arguments.flag_table import flags_of_all_ranks
from arguments.train import parse_train
from comm.timing import DEFAULT_TIMING, Timing
from tests.support.cluster import flags, make_model
from tests.support.flags import flags_of
from tests.support.launcher import free_port
from tests.support.runs import Outcome, Rank, Run, run_all
from tests.support.valid_run import argv

HOST = socket.gethostname()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    make_model(folder / "m")
    other = make_model(folder / "other", layer_norm_eps=0.125)
    (other / "pytorch_7.pt").unlink()
    (other / "pytorch_6.pt").write_text("longer")
    for name in ("token", "other-token"):
        (folder / name).write_text(f"a secret that is long: {name}")
    (folder / "token").chmod(0o600)
    return folder


def ranks(home: Path, odd: str, more: str = "", timing: Timing = DEFAULT_TIMING) -> list[Rank]:
    """Returns the four ranks of a run; all get the flags `more`, and rank 3 also gets `odd`."""
    common = flags(home, **{"dist-url": f"tcp://127.0.0.1:{free_port()}"}, **flags_of(more))
    return [
        Rank(argv({**common, "rank": rank, **flags_of(odd * (rank == 3))}), home, timing=timing)
        for rank in range(4)
    ]


@pytest.fixture(scope="module")
def outcomes(home: Path) -> dict[str, Outcome]:
    token, other = (f"--job-token-file {home}/{name}" for name in ("token", "other-token"))
    runs = [
        Run("missing", ranks(home, other, f"{token} --join-timeout 5", Timing(report=1.0))),
        Run("fine", ranks(home, "")),
        Run("another model", ranks(home, f"--model-name {home}/other")),
        Run("another flag", ranks(home, "--seq-length 16")),
        Run("no model", ranks(home, f"--model-name {home}/nowhere")),
    ]
    return run_all([[run] for run in runs], at_once=4)


def test_ranks_that_agree(home: Path, outcomes: dict[str, Outcome]) -> None:
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
    pairs = {"pipeline": ["01", "10", "23", "32"], "replicas": ["02", "20", "13", "31"]}
    assert found == [(*pair, channel) for channel in pairs for pair in pairs[channel]]
    assert any(f", torch {torch.__version__}, " in line for line in lines)
    assert "check passed: all ranks agree" in lines[-1]
    assert any("2 microbatches per pipeline, gpipe, --num-layers 4,4" in line for line in lines)
    assert not (home / "none").exists(), "nothing is written"


def test_another_model_on_one_rank(outcomes: dict[str, Outcome]) -> None:
    first = outcomes["another model"][0]
    assert [one.status for one in outcomes["another model"]] == [1] * 4
    told = first.stdout.splitlines()
    who = f"rank 3 (host {HOST})"
    assert f"- config.json: layer_norm_eps is 0.125 on {who}, but 1e-05 on the others" in told
    sizes = f"6 bytes on {who}", f"0 bytes on rank 1 (host {HOST})"
    assert {f"- pytorch_6.pt is {a}, but {b}" for a, b in permutations(sizes)} & set(told)
    assert f"- {who} has no pytorch_7.pt in --model-name" in told
    assert told[-1] == "check failed: differences and missing items, listed above: 3"


def test_no_model_on_one_rank(outcomes: dict[str, Outcome]) -> None:
    """If rank 3 has no model, an iteration's time is estimated from another rank's config.json."""
    told = outcomes["no model"][0].stdout
    assert [one.status for one in outcomes["no model"]] == [1] * 4
    assert re.search(r"- rank 3 \(host .*\): --model-name \S*nowhere: no such folder\n", told)
    assert "an iteration (" in told


def test_another_flag_on_one_rank(outcomes: dict[str, Outcome]) -> None:
    for one in outcomes["another flag"]:
        assert one.status == 2
        assert "--seq-length must be the same on all ranks" in one.stderr


def test_a_missing_rank_is_named_while_the_others_wait(outcomes: dict[str, Outcome]) -> None:
    """Rank 3 has another job's token, so it ends early; the other ranks report it as missing."""
    *waiting, other = outcomes["missing"]
    for one in waiting:
        assert one.status == 1
        assert re.search(r"waiting for rank 3 \(\d s of 5 s\)", one.stdout)
        assert "rank 3 did not join" in one.stderr
    assert other.status == 2
    assert f"differs from that of rank 3 (host {HOST})" in other.stderr
    assert other.seconds < waiting[0].seconds
    assert "other-token: other users can read it" in other.stdout
    for one in outcomes["missing"]:
        assert "a secret" not in one.stdout + one.stderr


def test_what_a_rank_tells_of_its_flags_names_no_job(home: Path) -> None:
    more = {"job-id": "a secret", "job-token-file": home / "token"}
    told = flags_of_all_ranks(parse_train(argv(flags(home, **more)), {}))
    assert told["--seq-length"] == 24
    assert not [flag for flag in told if flag.startswith("--job")]
