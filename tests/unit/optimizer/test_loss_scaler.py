"""Tests the loss scale of a resumed run whose flags have changed."""

import logging
from typing import Any

import pytest

from arguments.flag_table import free_flags
from arguments.train import parse_train
from checkpoint.resume.compatibility import describe_changes
from optimizer.loss_scaler import ConstantScale, DynamicScale
from tests.support.cases import to_argv
from tests.support.flags import flags_of
from training.resume import idle_flags


def dynamic(
    *, initial: float = 32768.0, minimum: float = 1.0, window: int = 1000, hysteresis: int = 2
) -> DynamicScale:
    return DynamicScale(initial=initial, minimum=minimum, window=window, hysteresis=hysteresis)


def after(scaler: DynamicScale, verdicts: str) -> DynamicScale:
    """Returns the scaler after the updates in `verdicts`: c is clean, o is an overflow."""
    for verdict in verdicts:
        scaler.update(overflow=verdict == "o")
    return scaler


def resumed(kept: DynamicScale, scaler: DynamicScale) -> DynamicScale:
    scaler.load_state(kept.state())
    return scaler


def test_a_constant_scale_becomes_a_dynamic_one(caplog: pytest.LogCaptureFixture) -> None:
    """If the checkpoint's scale was constant, a dynamic scale starts at --initial-loss-scale."""
    scaler = dynamic(initial=1024.0, hysteresis=1)
    with caplog.at_level(logging.INFO):
        scaler.load_state(ConstantScale(128.0, may_skip=True).state())
    assert scaler.scale == 1024.0
    assert after(scaler, "o").scale == 512.0
    assert "was constant, 128" in caplog.text
    assert "--initial-loss-scale 1024" in caplog.text


def test_a_dynamic_scale_becomes_a_constant_one() -> None:
    scaler = ConstantScale(128.0, may_skip=True)
    scaler.load_state(dynamic().state())
    assert scaler.scale == 128.0


def test_a_shorter_window_is_full_already() -> None:
    """If --loss-scale-window changes to 3 after 5 clean updates, update 6 doubles the scale."""
    scaler = resumed(after(dynamic(window=10), "ccccc"), dynamic(window=3))
    assert after(scaler, "c").scale == 65536.0
    assert after(scaler, "cc").scale == 65536.0
    assert after(scaler, "c").scale == 131072.0


def test_a_higher_minimum_lifts_the_scale(caplog: pytest.LogCaptureFixture) -> None:
    """A loaded scale below --min-loss-scale rises to it; overflows then do not change the scale."""
    with caplog.at_level(logging.INFO):
        scaler = resumed(dynamic(initial=16.0), dynamic(minimum=64.0, hysteresis=1))
    assert scaler.scale == 64.0
    assert after(scaler, "oo").scale == 64.0
    assert "16, rises to --min-loss-scale 64" in caplog.text


def test_a_lower_hysteresis_holds_at_once() -> None:
    scaler = resumed(dynamic(hysteresis=5), dynamic(hysteresis=2))
    assert after(scaler, "o").scale == 32768.0
    assert after(scaler, "o").scale == 16384.0


def test_what_is_left_of_the_hysteresis_comes_back() -> None:
    scaler = resumed(after(dynamic(hysteresis=3), "o"), dynamic(hysteresis=3))
    assert after(scaler, "o").scale == 32768.0
    assert after(scaler, "o").scale == 16384.0


DYNAMIC = {"--initial-loss-scale", "--min-loss-scale", "--loss-scale-window", "--hysteresis"}
ONE, EIGHT = (ConstantScale(scale, may_skip=scale > 1).state() for scale in (1.0, 8.0))
# flags, the scaler's state in the checkpoint, and the flags without effect
IDLE: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "fp32": ("", ONE, DYNAMIC | {"--loss-scale", "--max-skipped-updates"}),
    "a constant scale": ("--fp16 --loss-scale 8", dynamic().state(), DYNAMIC),
    "the same dynamic scale": ("--fp16", dynamic().state(), {"--initial-loss-scale"}),
    "from constant to dynamic": ("--fp16", EIGHT, set()),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_change_without_effect_says_so(case: str) -> None:
    flags, scaler, idle = IDLE[case]
    required = "--model-name m --model-type gptneox --num-layers 2 --embedding-dim 8"
    flags = f"{required} --task-name cot --total-steps 4 {flags}"
    args = parse_train(to_argv(flags_of(flags)), {})
    kept = dict.fromkeys(free_flags(args), "other")
    told = describe_changes(kept, free_flags(args), idle=idle_flags(args.precision, scaler))
    assert len(told) == len(free_flags(args))
    silent = {
        line.split()[0] for line in told if line.endswith("; this flag has no effect in this run")
    }
    assert silent == idle
