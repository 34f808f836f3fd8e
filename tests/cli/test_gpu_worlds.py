"""Tests, on a CPU, the complete checks of tests/gpu that train; default tests run their parts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source import ROOT

CHECKS = ("check_3_nccl", "check_4_worlds", "check_5_memory", "check_7_speed")
SECONDS = 240
NEW_INTERPRETERS = """
from tests.gpu.check_3_nccl import check
from tests.gpu.report import run_check
from tests.support.launcher import use_new_interpreters

use_new_interpreters()
run_check(check)
"""


def rows_of(place: Path, *command: str) -> dict[str, bool | None]:
    """Runs a check on a CPU; returns whether each row holds, None for a value without a limit."""
    path = place / "rows.json"
    flags = ("--device", "cpu", "--limit", str(SECONDS), "--json", str(path))
    subprocess.run([sys.executable, *command, *flags], cwd=ROOT, check=True, timeout=SECONDS + 60)
    report = json.loads(path.read_text())
    assert report["status"] == "ok"
    return {row["name"]: row["ok"] for row in report["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_complete_check_holds_on_a_cpu(name: str, tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "-m", f"tests.gpu.{name}")
    assert list(rows.values()).count(True) >= 4


@pytest.mark.slow
def test_ranks_can_be_new_interpreters(tmp_path: Path) -> None:
    """On a GPU every rank is a new Python interpreter and no fork, so CUDA starts as for a user."""
    rows = rows_of(tmp_path, "-c", NEW_INTERPRETERS, "--quick")
    assert rows["a group of two over gloo"]
    assert rows["training, gloo 1f1b"]
    assert rows["training, gloo replicas"]
