"""Tests --check-cluster between two hosts; a traffic shaper limits each host's send rate."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import make_model
from tests.support.hosts import HOSTS, wired
from tests.support.runs import Rank, Run, run_all

# Bytes per second that each host sends, including headers: both are far below what a busy machine
# can send, so the shapers decide.
RATES = (1e6, 3e6)


@pytest.fixture(scope="module")
def wire() -> Iterator[None]:
    """Creates the two hosts for the duration of the tests."""
    with wired():
        yield


@pytest.mark.usefixtures("wire")
def test_the_rate_of_a_link_is_that_of_its_shaper(tmp_path: Path) -> None:
    """The reported rates are about the shapers'; the two hosts may have different model paths."""
    near, far = HOSTS
    for host, rate in zip(HOSTS, RATES, strict=True):
        shape(host.name, host.interface, rate)
    ranks = []
    for number, host in enumerate(HOSTS):
        home = tmp_path / host.name
        make_model(home / f"model{number}")
        (home / f"token{number}").write_text("only these two machines know")
        flags = f"""--model-name {home}/model{number} --model-type gptneox --num-layers 4
            --embedding-dim 32 --task-name none.jsonl --seq-length 64 --batch-size 32
            --micro-batch-size 32 --total-steps 1 --world-size 2 --pipeline-group-size 2
            --rank {number} --dist-url tcp://{near.address}:7033 --check-cluster true
            --job-token-file {home}/token{number}"""
        ranks.append(Rank(flags.split(), home, host=host.name))
    outcomes = run_all([[Run("check", ranks)]], at_once=1)["check"]
    assert [one.status for one in outcomes] == [0, 0], outcomes
    told = outcomes[0].stdout
    assert "only these" not in told + outcomes[0].stderr + outcomes[1].stderr
    for (source, to), rate in zip(((near, far), (far, near)), RATES, strict=True):
        assert 0.4 * rate < rate_of(told, source.name, to.name) < 1.2 * rate
    assert f"stage 0 -> stage 1 of pipeline 0 (rank 0 ({near.name}) -> rank 1 ({far.name}))" in told
    assert "both stages on one machine, or a faster link between them, would help" in told


def shape(host: str, interface: str, rate: float) -> None:
    if shutil.which("tc") is None:
        pytest.skip("needs the command tc (Debian's package iproute2)")
    shaper = ["tbf", "rate", f"{8 * rate / 1e6:g}mbit", "burst", "64kb", "latency", "400ms"]
    command = ["tc", "-n", host, "qdisc", "add", "dev", interface, "root", *shaper]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"cannot shape a link here: {error.stderr.strip()}")


def rate_of(told: str, source: str, to: str) -> float:
    """Returns the reported bytes per second from `source` to `to`."""
    pattern = rf"^rank \d \({source}\) -> rank \d \({to}\) .* (\S+) (kB|MB|GB)/s$"
    found = re.search(pattern, told, re.MULTILINE)
    assert found, told
    return float(found[1]) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[found[2]]
