"""Tests tests/gpu/run.sh on a CPU: the quick part of all checks, as on a machine with a GPU."""

import json
import subprocess
import sys
from pathlib import Path

from tests.gpu.driver import CHECKS
from tests.gpu.machine import ROOT
from tests.gpu.report import FAILED, NOT_HERE, OK

_DEADLINE = 240.0  # the checks need some 40 s, on a machine with other tests more


def test_the_quick_part_of_all_checks_passes_on_a_cpu(tmp_path: Path) -> None:
    """The prepared script works before a GPU is at hand: no check fails, and all eight report."""
    command = ["bash", str(ROOT / "tests/gpu/run.sh"), "--python", sys.executable]
    command += ["--device", "cpu", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=_DEADLINE, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    run = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert (run["status"], run["device"], run["quick"]) == (OK, "cpu", True)
    assert [check["number"] for check in run["checks"]] == list(range(8))
    statuses = {check["number"]: check["status"] for check in run["checks"]}
    assert FAILED not in statuses.values()
    assert statuses[0] == statuses[6] == OK
    assert statuses[1] == NOT_HERE  # a kernel that waits needs a GPU
    assert all(check["rows"] for check in run["checks"] if check["status"] == OK)
    assert all(check["note"] for check in run["checks"] if check["status"] == NOT_HERE)
    for check in CHECKS:
        assert f"\n{check.number}      {check.name}" in done.stdout
