"""Tests that the numerics of tests/gpu hold on a CPU; the driver's test runs their quick part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.source import ROOT

MODULE = "tests.gpu.check_2_numerics"
DEADLINE = 900.0  # seconds; the check needs about 30 s of a CPU core
SECTIONS = (
    "fp32 gptj, head 256, documents: gradients",
    "bf16 gptneox, head 256, documents: gradients",
    "bf16 qwen3, head 256, documents: gradients",
    "fp16 gptneox, head 64: gradients",
    "rotary halves bf16",
    "attention in documents bf16, head 80",
    "head of 50304 gptj bf16, 4 chunks: gradients",
    "dropout gptneox, documents, bf16: recompute",
    "AdamW bf16, offload = none",
    "snapshot 2: later changes do not reach it",
    "host copies of update 2",
    "tracer: the span has the sleep's length",
    "two passes fp16 gptj, dropout: deterministic",
    "out of memory, host copies: recognised",
)


@pytest.mark.slow
def test_all_numerics_hold_on_a_cpu(tmp_path: Path) -> None:
    rows_file = tmp_path / "rows.json"
    command = [sys.executable, "-m", MODULE, "--device", "cpu", "--json", str(rows_file)]
    done = subprocess.run(
        [*command, "--limit", str(DEADLINE)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DEADLINE + 60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(rows_file.read_text())
    assert report["status"] == "ok"
    holds = {row["name"]: row["ok"] for row in report["rows"]}
    assert [name for name in SECTIONS if holds.get(name) is not True] == []
