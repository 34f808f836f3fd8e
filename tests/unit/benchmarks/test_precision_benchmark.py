"""Tests that benchmarks/precision.py fails if a loss is NaN or too far from the loss in fp32."""

import math
from pathlib import Path

import pytest

from benchmarks import precision

FP32 = (4.0, 5.0, 0.1)
ENDS = {
    "all within": ({}, []),
    "bf16 above": ({"bf16": (4.05, 5.0, 0.1)}, ["bf16 (limit 1%)"]),
    "bf16 below": ({"bf16": (3.95, 5.0, 0.1)}, ["bf16 (limit 1%)"]),
    "held-out above": ({"fp16": (4.0, 5.06, 0.1)}, ["fp16 (limit 1%)"]),
    "8-bit has 2%": ({"fp32 8bit-adam": (4.07, 5.0, 0.1)}, []),
    "8-bit above": ({"fp32 8bit-adam": (4.09, 5.0, 0.1)}, ["fp32 8bit-adam (limit 2%)"]),
    "no number": ({"bf16": (math.nan, 5.0, 0.1)}, ["bf16 (limit 1%)"]),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_ends_too_far_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends, beyond = ENDS[name]

    def trained(
        folder: Path, run: str, flags: list[str], updates: int
    ) -> tuple[float, float, float]:
        return ends.get(run, FP32)

    monkeypatch.setattr(precision, "train", trained)
    assert precision.compare(tmp_path, 200) == beyond
    monkeypatch.setattr(precision, "prepare", lambda folder: None)
    monkeypatch.setattr("sys.argv", ["precision.py"])
    if beyond:
        with pytest.raises(SystemExit, match=beyond[0].split()[0]):
            precision.main()
    else:
        precision.main()
