"""Tests conversions that fail or are interrupted, and the scripts that users run to convert."""

import logging
import os
import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoint_models import (
    NUM_LAYERS,
    edit_json,
    edit_weights,
    hf_weights,
    to_hf,
    to_shards,
)
from tests.support.refusal import check_refused
from tests.support.valid_run import the_line

ROOT = Path(__file__).parents[3]
HF_QKV = "gpt_neox.layers.1.attention.query_key_value.weight"


def test_nothing_is_overwritten(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "st").mkdir()
    (tmp_path / "st" / "precious").write_text("kept")
    for call in (
        lambda: to_shards(originals / "st", tmp_path),
        lambda: to_hf(originals / "ck", tmp_path / "st"),
    ):
        check_refused(call, "st: exists already")
    assert [path.name for path in (tmp_path / "st").iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["st"]


def test_a_disk_too_small_is_told_first(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**6, 10**6 - 1000, 1000))
    for call in (
        lambda: to_shards(originals / "st", tmp_path / "out"),
        lambda: to_hf(originals / "ck", tmp_path / "out" / "hf"),
    ):
        check_refused(call, "needs 178.6 kB of disk", "1.0 kB is free")
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_neither_folder_nor_to_be_had(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_args: Any, **_options: Any) -> str:
        raise OSError("name resolution\nfailed")

    monkeypatch.setattr("checkpoint.files.model_folder.snapshot_download", unreachable)
    name, ck = "some-org/some-model", originals / "ck"
    check_refused(lambda: to_shards(name, tmp_path), f"--model-name {name}")
    check_refused(
        lambda: to_hf(ck, tmp_path / "hf", config_name="nowhere"), "--config-name nowhere"
    )


def test_an_interrupted_conversion_leaves_nothing(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: Any) -> None:
        assert list(tmp_path.glob("st.partial-*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("checkpoint.conversion.from_hf.copy_companions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_shards(originals / "st", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Yields a function that runs a script in this process; at the end, restores log levels."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "httpx")]
    levels = [logger.level for logger in loggers]

    def run_script(name: str, *flags: str | Path) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        runpy.run_path(str(ROOT / name), run_name="__main__")

    yield run_script
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_scripts_end_with_status_2_and_one_line(
    originals: Path, tmp_path: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(originals / "st", tmp_path / "in")
    edit_weights(source / "model.safetensors", {HF_QKV: torch.full((96, 32), float("nan"))})
    hf = ("--model-name", source, "--save-dir", tmp_path / "s")
    ours = ("--ckpt-path", originals / "ck", "--save-path", tmp_path / "o")
    for name, flags, words in (
        ("convert_from_hf_gptneox.py", hf, [HF_QKV, "not finite"]),
        ("convert_from_hf_gptj.py", hf, ["config.json", "'gptj'"]),
        ("convert_to_hf_gptj.py", ours, ["config.json", "'gptj'"]),
        ("convert_from_hf_gptj.py", (*hf[:2], "--dtype", "int8"), ["int8"]),
    ):
        with pytest.raises(SystemExit) as ended:
            run(name, *flags)
        assert ended.value.code == 2
        line = the_line(capsys.readouterr().err)
        assert all(word in line for word in words), line


def test_scripts_convert_both_ways(
    originals: Path, tmp_path: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    """Both scripts leave stderr empty; one runs in a new process, so its imports are tested too."""
    hf = tmp_path / "hf"
    flags = ("--ckpt-path", originals / "ck", "--save-path", hf, "--verify")
    done = subprocess.run(
        [sys.executable, ROOT / "convert_to_hf_gptneox.py", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "logits differ by" in done.stdout
    run("convert_from_hf_gptneox.py", "--model-name", hf, "--save-dir", tmp_path / "s")
    assert capsys.readouterr().err == ""
    assert (tmp_path / "s" / "hf" / "pytorch_lm_head.pt").exists()


def test_scripts_of_any_family_read_it_from_the_config(
    originals: Path, tmp_path: Path, run: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    run("convert_from_hf.py", "--model-name", originals / "st", "--save-dir", tmp_path)
    made = [path.name for path in (originals / "shards").glob("*.pt")]
    assert len(made) == NUM_LAYERS + 2
    for name in made:
        expected = (originals / "shards" / name).read_bytes()
        assert (tmp_path / "st" / name).read_bytes() == expected
    flags = ("--ckpt-path", originals / "ck", "--save-path", tmp_path / "hf")
    run("convert_to_hf.py", *flags)
    found, expected_weights = hf_weights(tmp_path / "hf"), hf_weights(originals / "st")
    assert found.keys() == expected_weights.keys()
    assert all(torch.equal(found[key], expected_weights[key]) for key in found)
    assert capsys.readouterr().err == ""

    edit_json(tmp_path / "st" / "config.json", model_type="mamba")
    for name, options in (
        ("convert_from_hf.py", ("--model-name", tmp_path / "st", "--save-dir", tmp_path / "s")),
        ("convert_to_hf.py", (*flags, "--config-name", tmp_path / "st")),
    ):
        with pytest.raises(SystemExit) as ended:
            run(name, *options)
        assert ended.value.code == 2
        line = the_line(capsys.readouterr().err)
        assert "config.json: model_type is 'mamba', expected one of" in line
        assert "gpt_neox, llama" in line
