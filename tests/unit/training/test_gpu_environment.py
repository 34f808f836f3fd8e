"""Tests the environment variables for GPUs, and --deterministic, without a GPU."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch

from comm.lifecycle.stop_signals import StopRequest
from comm.rendezvous.join import Rendezvous
from comm.topology import Topology
from monitor.metrics import read_metrics
from tests.support.alone import train_alone
from tests.support.cases import settings_of
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.models import make_shards
from training.gpu_environment import set_gpu_variables
from training.meeting import Meeting
from training.session import run_session
from training.startup_checks import LocalResources

ROOT = Path(__file__).parents[3]
QUEUES, CHANNELS = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, {"NCCL_MAX_P2P_NCHANNELS": "2"}
ALLOCATOR = "expandable_segments:True,pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"
FLAGS = flags_of("""
    --model-name nowhere --model-type gptneox --num-layers 1 --embedding-dim 8 --task-name nothing
    --total-steps 1
""")
# Writes the environment and ends the process at the first import of torch.
WITNESS = """
import importlib.abc, json, os, sys

class Witness(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.write(1, json.dumps(dict(os.environ)).encode())
            os._exit(0)

sys.meta_path.insert(0, Witness())
from dist_clm_train import main
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    yield
    torch.set_deterministic_debug_mode("default")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.fixture
def torch_2_13() -> Iterator[None]:
    with patch("training.gpu_environment.version", return_value="2.13.0+cpu"):
        yield


@pytest.mark.usefixtures("torch_2_13")
def test_unset_variables_are_set() -> None:
    environ = {"HOME": "/"}
    changed = set_gpu_variables(environ, deterministic=False)
    assert changed == QUEUES | CHANNELS | {"PYTORCH_ALLOC_CONF": ALLOCATOR}
    assert environ == {"HOME": "/"} | changed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, CHANNELS | {"PYTORCH_ALLOC_CONF": ALLOCATOR}),
        ({"PYTORCH_ALLOC_CONF": ""}, QUEUES | CHANNELS),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, QUEUES | CHANNELS),
        ({"PYTORCH_HIP_ALLOC_CONF": "max_split_size_mb:64"}, QUEUES | CHANNELS),
        ({"NCCL_MAX_P2P_NCHANNELS": "8", "PYTORCH_ALLOC_CONF": "backend:native"}, QUEUES),
    ],
)
@pytest.mark.usefixtures("torch_2_13")
def test_what_the_user_set_stays(given: dict[str, str], expected: dict[str, str]) -> None:
    environ = dict(given)
    assert set_gpu_variables(environ, deterministic=False) == expected
    assert environ == given | expected


@pytest.mark.parametrize(
    ("version", "known"),
    [("2.11.0+cu130", False), ("2.12.1", False), ("2.13.0a0+git1", True), ("3.0", True)],
)
def test_older_versions_of_torch_get_no_option_that_they_refuse(version: str, known: bool) -> None:
    """torch 2.12 ends with an error at pinned_max_round_threshold_mb, which 2.13 introduces."""
    environ: dict[str, str] = {}
    with patch("training.gpu_environment.version", return_value=version):
        set_gpu_variables(environ, deterministic=False)
    assert ("pinned_max_round_threshold_mb" in environ["PYTORCH_ALLOC_CONF"]) == known


@pytest.mark.parametrize("given", [{}, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}])
def test_only_a_deterministic_run_sets_the_workspace_of_cublas(given: dict[str, str]) -> None:
    for deterministic in (False, True):
        environ = dict(given)
        set_gpu_variables(environ, deterministic=deterministic)
        expected = given.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8" if deterministic else None)
        assert environ.get("CUBLAS_WORKSPACE_CONFIG") == expected


@pytest.mark.parametrize(
    "more",
    [
        "--check-cluster",
        "--plan",
        "--world-size 2 --pipeline-group-size 2",
        "--check-cluster --use-cuda false",
    ],
)
def test_the_variables_are_set_before_torch_is_imported(more: str) -> None:
    """CUDA and torch read the variables once, so a later change would have no effect.

    A run with --use-cuda false needs no variables. A plan counts the run's pinned memory, which
    depends on PYTORCH_ALLOC_CONF.
    """
    given = {**FLAGS, "deterministic": "true", **flags_of(more)}
    argv = [text for flag, value in given.items() for text in (f"--{flag}", value)]
    names = {*QUEUES, *CHANNELS, "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"}
    environ = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", WITNESS, *argv],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    seen = json.loads(done.stdout.splitlines()[-1])
    assert names & seen.keys() == (set() if "false" in more else names)


def run_here(device: str, flags: str, policy: Mock) -> bool | None:
    """Runs a session of one rank with a double for the device.

    Returns whether torch was in its deterministic mode; None if the run ended before.
    """
    states = []

    def check_cluster(*_: Any) -> int:
        states.append(torch.are_deterministic_algorithms_enabled())
        return 0

    settings = settings_of(FLAGS | flags_of(f"--check-cluster {flags}"))
    resources = LocalResources(gpu_variables={"A": "1", "B": "x:y"})
    meeting = Meeting(Rendezvous.alone(), Topology(0, 1, 1), policy)
    with (
        patch("training.session.choose_device", return_value=torch.device(device)),
        patch("training.session.check_cluster", check_cluster),
    ):
        run_session(settings, resources, meeting, Mock(), StopRequest())
    return states[0] if states else None


@pytest.mark.parametrize(("device", "expected"), [("cuda", ["A=1, B=x:y"]), ("cpu", [])])
def test_a_run_on_a_gpu_logs_what_it_set(
    device: str, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run_here(device, "", Mock())
    assert [record.message.split("unset: ")[1] for record in caplog.records] == expected


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cuda", "--deterministic", True),
        ("cuda", "", False),
        ("cpu", "--deterministic", False),  # runs on CPUs have the same bits without it
    ],
)
def test_deterministic_changes_runs_on_gpus_only(
    device: str, flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert run_here(device, flags, Mock()) is expected
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert filled is not expected
    assert torch.backends.cudnn.benchmark is not expected


def test_a_workspace_with_other_bits_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    policy = Mock()
    policy.fail.side_effect = SystemExit
    with pytest.raises(SystemExit):
        run_here("cuda", "--deterministic", policy)
    status, line = policy.fail.call_args.args
    assert status == 2
    assert "--deterministic true: CUBLAS_WORKSPACE_CONFIG is ':0:0'" in line
    assert ":4096:8" in line


@pytest.mark.parametrize("more", ["", "--bf16"])
def test_all_of_training_has_deterministic_kernels(more: str, tmp_path: Path) -> None:
    """A step with packed documents and dropout needs no operation that this mode refuses."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(20, seed=1))
    make_shards(tmp_path, "m", "gptneox", {"hidden_dropout": 0.1, "attention_dropout": 0.1})
    flags = flags_of(f"""
        --model-name {tmp_path}/shards/m --model-type gptneox --num-layers 3 --embedding-dim 32
        --task-name {tmp_path}/a.jsonl --seq-length 16 --batch-size 2 --total-steps 1
        --use-cuda false --pack document --checkpoint-path {tmp_path / "run"} {more}
    """) | {"checkpoint-path": tmp_path / "run"}
    torch.set_deterministic_debug_mode("error")
    train_alone(flags)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
