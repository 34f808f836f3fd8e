"""Tests the driver of the checks in tests/gpu with checks that fail, hang and crash."""

import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import packages
from tests.gpu.check_1_spin import Experiment, Result, add_rows
from tests.gpu.driver import CHECKS, TOTAL_SECONDS, CheckEntry, main, share
from tests.gpu.report import FAILED, NOT_HERE, OK, CheckReport

Capture = pytest.CaptureFixture[str]

FAKES = {
    "fails": """
        report.measure("a number", 3.0, "s")
        report.expect("two is three", False, 2.0)
        report.expect("two is two", True)""",
    "raises": """raise RuntimeError("the words of the error")""",
    "hangs": """
        report.expect("before the hang", True)
        child = subprocess.Popen(["sleep", "60"], preexec_fn=os.setpgrp)
        Path(os.environ["FAKE_FOLDER"], "child").write_text(str(child.pid))
        wait_for_ever()""",
    "crashes": """os.kill(os.getpid(), signal.SIGSEGV)""",
    "exits": """
        report.expect("before the exit", True)
        os._exit(0)""",
    "not_here": """report.not_here("it needs a moon")""",
    "fine": """report.expect("the device", options.device == "cpu" and options.quick)""",
}
HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path

def wait_for_ever():
    while True:
        time.sleep(0.1)

def check(report, options):
"""


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[CheckEntry]:
    """Returns a table of checks, whose modules are in a folder of their own."""
    modules = tmp_path / "modules"
    modules.mkdir()
    entries = []
    for number, (name, body) in enumerate(FAKES.items()):
        module = f"check_{number}_{name}"
        lines = "".join(f"    {line.strip()}\n" for line in body.strip().splitlines())
        (modules / f"{module}.py").write_text(HEAD + lines)
        entries.append(CheckEntry(number, module, 1.0, 1.25 if name == "hangs" else 20.0))
    entries.append(CheckEntry(len(entries), f"check_{len(entries)}_missing", 1.0, 1.0))
    entries.append(CheckEntry(len(entries), f"check_{len(entries)}_gpu", 1.0, 1.0, needs_gpu=True))
    monkeypatch.syspath_prepend(modules)
    (modules / f"{entries[-1].module}.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    return entries


def run(entries: Sequence[CheckEntry], out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Runs the driver; returns its exit status, and the checks of gpu.json by name."""
    status = main(["--device", "cpu", "--quick", "--out", str(out), *more], entries)
    checks = json.loads((out / "gpu.json").read_text())["checks"]
    return status, {check["name"]: check for check in checks}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_check_ends_the_next_one(
    fakes: list[CheckEntry], tmp_path: Path, capsys: Capture
) -> None:
    """Checks that fail, hang or crash fail with a reason, and all later checks run."""
    status, checks = run(fakes, tmp_path / "out")
    output = capsys.readouterr().out
    assert status == 1
    assert {name: check["status"] for name, check in checks.items()} == {
        **dict.fromkeys(["fails", "raises", "hangs", "crashes", "exits"], FAILED),
        **dict.fromkeys(["not_here", "missing", "gpu"], NOT_HERE),
        "fine": OK,
    }
    assert checks["fails"]["note"] == "1 of 3 rows failed"
    assert [row["value"] for row in checks["fails"]["rows"]] == [3.0, 2.0, None]
    assert checks["raises"]["rows"][0]["note"] == "the words of the error"
    assert "ended by SIGSEGV" in checks["crashes"]["note"]
    assert "ended early with exit status 0" in checks["exits"]["note"]
    assert checks["not_here"]["note"] == "it needs a moon"
    assert "check_7_missing.py does not exist" in checks["missing"]["note"]
    assert checks["gpu"]["note"] == "it needs a GPU"

    hung = checks["hangs"]
    assert [row["name"] for row in hung["rows"]] == ["before the hang"]
    assert "in wait_for_ever" in Path(hung["note"].partition("stacks in ")[2]).read_text()
    assert "in wait_for_ever" in output.rpartition("== failed in check 2, hangs")[2]
    assert hung["seconds"] < 2.5 + 5
    assert not is_alive(int((tmp_path / "child").read_text()))


def test_the_exit_status_is_0_if_no_check_failed(fakes: list[CheckEntry], tmp_path: Path) -> None:
    """A check that is left out, or that cannot run here, is no failure."""
    status, checks = run(fakes, tmp_path / "out", "--only", "5,6")
    assert status == 0
    assert checks["hangs"]["status"] == NOT_HERE
    assert checks["hangs"]["note"] == "left out by --only"
    assert [checks["not_here"]["status"], checks["fine"]["status"]] == [NOT_HERE, OK]


def test_an_unknown_check_is_refused(tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--only", "0,9", "--out", str(tmp_path)])
    assert refused.value.code == 2
    assert "there is no check 9" in capsys.readouterr().err


def test_checks_that_all_hang_take_no_more_than_the_total() -> None:
    """Eight minutes suffice also if each check uses all of its time, or half of it."""
    for used in (1.0, 0.5):
        left, limits = TOTAL_SECONDS, []
        planned = [check.seconds for check in CHECKS]
        while planned:
            limits.append(share(left, planned))
            left -= used * limits[-1]
            planned.pop(0)
        assert left >= 0
        assert all(
            check.seconds <= limit <= 2 * check.seconds
            for check, limit in zip(CHECKS, limits, strict=True)
        )


def test_missing_packages_come_from_wheels_and_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """A bare machine gets what it lacks; a wheel of a package that it has is not installed.

    pip would otherwise install such a wheel, too, and replace the machine's torch.
    """
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    for name in ("checks_need_this", "numpy"):
        info = f"{name}-99.0.dist-info"
        with zipfile.ZipFile(wheels / f"{name}-99.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}.py", "value = 99")
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 99.0\n"
            )
            wheel.writestr(
                f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            wheel.writestr(f"{info}/RECORD", "")
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# a comment\nnumpy\nchecks_need_this>=1\nwandb\n")
    monkeypatch.setattr(packages, "_REQUIREMENTS", requirements)
    monkeypatch.setattr(sys, "path", list(sys.path))
    command = ["--device", "cpu", "--target", str(target)]
    assert packages.main(command) == 2
    assert "lacks checks_need_this. Fetch the wheels" in capsys.readouterr().err
    assert packages.main([*command, "--wheels", str(wheels)]) == 0
    assert (target / "checks_need_this.py").exists()
    assert not (target / "numpy.py").exists()


def call(name: str, *, held: bool = False) -> dict[str, Any]:
    return {"name": name, "seconds": 0.1, "held": held, "query": 0.0, "stopped": 0.0, "error": ""}


LAZY = Experiment("launches", {"CUDA_MODULE_LOADING": "LAZY"})
OURS = Experiment("queues", {"CUDA_DEVICE_MAX_CONNECTIONS": "32"})
DEFAULT = Experiment("queues")
BESIDE = Experiment("beside")
RULE = {"early, cold": 3.1, "early, warm": 0.1, "rule, cold": 0.1, "rule, warm": 0.1, "hold": 1.5}
HELD_BLOCK = {"recorded": {"seconds": 1.5, "outcome": "memory"}, "hold": 1.5}
TOLD = {"seconds": 0.01, "outcome": "out of memory"}


@pytest.mark.parametrize(
    ("experiment", "result", "failed"),
    [
        (LAZY, {"calls": [call("first matmul", held=True), call("matmul again")]}, 0),
        (LAZY, {"calls": [call("matmul again", held=True)]}, 1),
        (OURS, {"held": {"high": [24, 31], "normal": [8]}, "streams": [8, 24, 31]}, 0),
        (OURS, {"held": {"high": [20], "normal": []}, "streams": [20]}, 1),
        (DEFAULT, {"held": {"high": [8], "normal": [8]}, "streams": [8]}, 0),
        (BESIDE, {"posting": RULE}, 0),
        (BESIDE, {"posting": {**RULE, "rule, cold": 1.6}}, 1),
        (BESIDE, {"detector": {"reported": 0.6, "launched": 3.0, "hold": 3.0}}, 0),
        (BESIDE, {"detector": {"reported": None, "launched": 3.0, "hold": 3.0}}, 1),
        (BESIDE, {"allocator": {**HELD_BLOCK, "held": TOLD}}, 0),
        (BESIDE, {"allocator": {**HELD_BLOCK, "held": HELD_BLOCK["recorded"]}}, 1),
        (BESIDE, {"theft": {"milliseconds": {"0": 0.8, "16": 1.0, "32": None}}}, 0),
        (BESIDE, {"theft": {"error": "CUDADriverError: the words"}}, 1),
    ],
)
def test_the_rules_of_the_gpu_path_are_rows_that_must_hold(
    experiment: Experiment, result: Result, failed: int
) -> None:
    """Check 1 fails if training's rules do not hold, and only measures the danger they avoid."""
    report = CheckReport()
    add_rows(report, experiment, result)
    assert report.rows
    assert sum(row.ok is False for row in report.rows) == failed
