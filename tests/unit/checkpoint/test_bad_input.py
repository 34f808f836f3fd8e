"""What is wrong with files and flags is one line that names it; nothing is left behind."""

import logging
import os
import pickle
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

from checkpoint.files.layer_shards import load_layer_shard
from pipeline_parallel.partition.split import Split
from tests.support.checkpoint_models import (
    copy_config,
    cut,
    edit_json,
    edit_weights,
    family,
    make_checkpoint,
    make_model,
    make_predecessors,
    reseal,
    save_model,
    step_meta,
    to_hf,
    to_shards,
)
from tests.support.valid_run import the_line

ROOT = Path(__file__).parents[3]
NAN = float("nan")


class RunsCode:
    """A pickle of it asks the reader to make a file in the working directory."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NeoX model in every form: st, many, bin, shards, ck (a step of ours: stages of 2 and 1)."""
    base = tmp_path_factory.mktemp("originals")
    model = make_model("gptneox")
    for folder, form in (("st", "single"), ("many", "sharded"), ("bin", "bin")):
        save_model(model, base / folder, form)
    to_shards(base / "st", base / "made").rename(base / "shards")
    make_checkpoint(base / "shards", base / "ck", counts=(2, 1), meta=step_meta(7, (2, 1)))
    copy_config(base / "shards", base / "ck")
    return base


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def weight(path: Path, key: str, shape: tuple[int, ...], fill: float = 0.0) -> None:
    edit_weights(path, {key: torch.full(shape, fill)})


def drop(path: Path, key: str) -> None:
    edit_weights(path, {key: None})


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": RunsCode()}, protocol=2))


QKV = "attention.query_key_value.weight"
HF_QKV = f"gpt_neox.layers.1.{QKV}"
ST, BIN, CK = "model.safetensors", "pytorch_model.bin", "prank_1_checkpoint.pt"
Case = namedtuple("Case", "form spoil words")

FROM_HF = {
    "missing key": Case("st", lambda d: drop(d / ST, HF_QKV), [HF_QKV, "missing"]),
    "missing head": Case(
        "st", lambda d: drop(d / ST, "embed_out.weight"), ["embed_out.weight or lm_head.weight"]
    ),
    "extra key": Case("st", lambda d: weight(d / ST, "a.b", (2,)), [ST, "a.b", "unexpected"]),
    "block too many": Case(
        "st", lambda d: weight(d / ST, f"gpt_neox.layers.3.{QKV}", (2,)), ["layers.3.", "unexp"]
    ),
    "misshapen": Case(
        "st", lambda d: weight(d / ST, HF_QKV, (5, 6)), [HF_QKV, "(5, 6)", "(96, 32)"]
    ),
    "integers": Case(
        "bin",
        lambda d: edit_weights(d / BIN, {HF_QKV: torch.ones(96, 32, dtype=torch.int8)}),
        [BIN, HF_QKV, "int8", "float32"],
    ),
    "nan": Case("st", lambda d: weight(d / ST, HF_QKV, (96, 32), NAN), [ST, HF_QKV, "not finite"]),
    "infinite": Case("bin", lambda d: weight(d / BIN, HF_QKV, (96, 32), 1 / 1e-320), [BIN, HF_QKV]),
    "two heads": Case(
        "st", lambda d: weight(d / ST, "lm_head.weight", (101, 32)), ["lm_head.weight", "differs"]
    ),
    "truncated safetensors": Case(
        "st", lambda d: cut(d / ST), [ST, "no complete safetensors file"]
    ),
    "truncated bin": Case("bin", lambda d: cut(d / BIN), [BIN, "bytes that are no complete"]),
    "empty bin": Case("bin", lambda d: (d / BIN).write_bytes(b""), [BIN, "0 bytes"]),
    "code": Case("bin", lambda d: pickled(d / BIN), [BIN, "refused", "posix.system"]),
    "code in a later protocol": Case(
        "bin", lambda d: (d / BIN).write_bytes(pickle.dumps(RunsCode())), [BIN, "refused"]
    ),
    "code in a zip": Case(
        "bin", lambda d: torch.save({"a": RunsCode()}, d / BIN), [BIN, "refused", "posix.system"]
    ),
    "no dict": Case("bin", lambda d: torch.save([1], d / BIN), [BIN, "list", "dict of tensors"]),
    "no tensor": Case("bin", lambda d: torch.save({"a": 1}, d / BIN), [BIN, "a is int"]),
    "no weights": Case("st", lambda d: (d / ST).unlink(), [ST, BIN, "expected one of"]),
    "file of the index missing": Case(
        "many", lambda d: first(d, "*.safetensors").unlink(), ["00001", "index.json names it"]
    ),
    "key of the index missing": Case(
        "many",
        lambda d: drop(first(d, "*.safetensors"), "gpt_neox.embed_in.weight"),
        ["00001", "gpt_neox.embed_in.weight"],
    ),
    "broken index": Case(
        "many", lambda d: (d / f"{ST}.index.json").write_text("{"), [f"{ST}.index.json", "JSON"]
    ),
    "no config": Case("st", lambda d: (d / "config.json").unlink(), ["config.json", "no such"]),
    "another family": Case(
        "st", lambda d: edit_json(d / "config.json", model_type="gptj"), ["'gptj'", "'gpt_neox'"]
    ),
    "config of another width": Case(
        "st", lambda d: edit_json(d / "config.json", hidden_size=64), ["(101, 32)", "(101, 64)"]
    ),
}


@pytest.mark.parametrize("case", FROM_HF.values(), ids=FROM_HF.keys())
def test_from_hf(
    case: Case, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(originals / case.form, tmp_path / "in")
    case.spoil(source)
    text = refusal(lambda: to_shards(source, tmp_path / "out"))
    assert all(word in text for word in case.words), text
    assert not list(tmp_path.glob("out/*"))
    assert not (tmp_path / "ran").exists()


SHARD = "pytorch_1.pt"
SHARDS = {
    "missing key": Case("", lambda d: drop(d / SHARD, QKV), [SHARD, QKV, "missing"]),
    "extra key": Case("", lambda d: weight(d / SHARD, "a.b", (2,)), [SHARD, "a.b", "unexpected"]),
    "misshapen": Case("", lambda d: weight(d / SHARD, QKV, (3, 4)), [QKV, "(3, 4)", "(96, 32)"]),
    "nan": Case("", lambda d: weight(d / SHARD, QKV, (96, 32), NAN), [SHARD, QKV, "not finite"]),
    "missing file": Case("", lambda d: (d / SHARD).unlink(), [SHARD, "no such file"]),
    "truncated": Case("", lambda d: cut(d / SHARD), [SHARD, "bytes that are no complete"]),
    "code": Case("", lambda d: pickled(d / SHARD), [SHARD, "refused", "posix.system"]),
    "a folder": Case("", lambda d: ((d / SHARD).unlink(), (d / SHARD).mkdir()), ["no such file"]),
}


@pytest.mark.parametrize("case", SHARDS.values(), ids=SHARDS.keys())
def test_shards(
    case: Case, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(originals / "shards", tmp_path / "in")
    case.spoil(folder)
    config = family("gptneox").load_config(folder)
    text = refusal(lambda: load_layer_shard(folder, family("gptneox"), config, 2))
    assert all(word in text for word in case.words), text
    assert not (tmp_path / "ran").exists()


def meta(folder: Path, **changes: Any) -> None:
    edit_json(folder / "meta.json", **changes)


TO_HF = {
    "missing stage": Case({}, lambda d: (d / CK).unlink(), [CK, "no such file"]),
    "missing key": Case({}, lambda d: drop(d / CK, f"0.{QKV}"), [CK, f"0.{QKV}", "missing"]),
    "extra module": Case({}, lambda d: weight(d / CK, f"2.{QKV}", (96, 32)), [CK, f"2.{QKV}"]),
    "misshapen": Case({}, lambda d: weight(d / CK, f"0.{QKV}", (4,)), [CK, "(4,)", "(96, 32)"]),
    "nan": Case({}, lambda d: weight(d / CK, f"0.{QKV}", (96, 32), NAN), [CK, "not finite"]),
    "beyond fp16": Case(
        {"fp16": True}, lambda d: weight(d / CK, f"0.{QKV}", (96, 32), 1e5), [CK, "100000", "65504"]
    ),
    "truncated": Case({}, lambda d: cut(d / CK), [CK, "bytes that are no complete"]),
    "code": Case({}, lambda d: pickled(d / CK), [CK, "refused", "posix.system"]),
    "other stages": Case({"n_stages": 3}, lambda d: None, ["--n-stages is 3", "meta.json says 2"]),
    "other layers": Case(
        {"n_layer_per_stage": 3}, lambda d: None, ["--n-layer-per-stage is 3", "meta.json says 2"]
    ),
    "other layers by list": Case(
        {"n_layer_per_stage": Split((1, 2))},
        lambda d: None,
        ["--n-layer-per-stage is 1,2", "meta.json says 2,1"],
    ),
    "layers of more stages": Case(
        {"n_layer_per_stage": Split((1, 1, 1))},
        lambda d: None,
        ["--n-layer-per-stage is 1,1,1", "meta.json says 2,1"],
    ),
    "stages unknown": Case({}, make_predecessors, ["--n-stages", "missing"]),
    "layers unknown": Case({"n_stages": 2}, make_predecessors, ["--n-layer-per-stage", "missing"]),
    "too few stages": Case(
        {"n_stages": 1, "n_layer_per_stage": 3}, make_predecessors, [CK, "--n-stages is 1"]
    ),
    "too few layers": Case(
        {"n_stages": 2, "n_layer_per_stage": 1},
        make_predecessors,
        ["--n-stages 2", "--n-layer-per-stage 1", "3"],
    ),
    "an empty stage": Case(
        {"n_stages": 2, "n_layer_per_stage": 3},
        make_predecessors,
        ["--n-stages 2", "--n-layer-per-stage 3", "3"],
    ),
    "a list of other stages": Case(
        {"n_stages": 3, "n_layer_per_stage": Split((2, 1))},
        make_predecessors,
        ["--n-stages 3", "--n-layer-per-stage 2,1", "2 stages", "3 layers"],
    ),
    "a list of other layers": Case(
        {"n_layer_per_stage": Split((2, 2))},
        make_predecessors,
        ["--n-layer-per-stage 2,2", "4 layers", "3 layers"],
    ),
    "a list in another order": Case(
        {"n_layer_per_stage": Split((1, 2))},
        make_predecessors,
        ["prank_0_checkpoint.pt", "2.attention", "unexpected"],
    ),
    "another model's": Case({}, lambda d: meta(d, model_type="gptj"), ["'gptj'", "'gptneox'"]),
    "another depth's": Case({}, lambda d: meta(d, num_layers=[2, 2]), ["2,2", "4 in all", "3"]),
    "an empty stage in meta": Case(
        {}, lambda d: meta(d, num_layers=[3, 0]), ["meta.json", "[3, 0]"]
    ),
    "fewer stages in meta": Case({}, lambda d: meta(d, num_layers=[3]), ["meta.json", "[3]", "2"]),
    "meta of no sense": Case({}, lambda d: meta(d, num_layers=3), ["meta.json", "num_layers is 3"]),
    "broken meta": Case({}, lambda d: (d / "meta.json").write_text("{"), ["meta.json", "JSON"]),
    "no config": Case({}, lambda d: (d / "config.json").unlink(), ["--config-name is missing"]),
    "latest of no sense": Case({}, lambda d: (d / "latest").write_text("x"), ["latest", "'x'"]),
    "latest to nowhere": Case(
        {}, lambda d: (d / "latest").write_text("8"), ["8/", "checkpoint_8/"]
    ),
    "no folder": Case({}, lambda d: shutil.rmtree(d), ["in", "no such folder"]),
}


@pytest.mark.parametrize("case", TO_HF.values(), ids=TO_HF.keys())
def test_to_hf(
    case: Case, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(originals / "ck", tmp_path / "in")
    case.spoil(source)
    reseal(source)
    text = refusal(lambda: to_hf(source, tmp_path / "out" / "hf", **case.form))
    assert all(word in text for word in case.words), text
    assert not list(tmp_path.glob("out/*"))
    assert not (tmp_path / "ran").exists()


def test_nothing_is_overwritten(originals: Path, tmp_path: Path) -> None:
    (tmp_path / "st").mkdir()
    (tmp_path / "st" / "precious").write_text("kept")
    for call in (
        lambda: to_shards(originals / "st", tmp_path),
        lambda: to_hf(originals / "ck", tmp_path / "st"),
    ):
        assert "st: exists already" in refusal(call)
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
        text = refusal(call)
        assert "needs 178.6 kB of disk" in text
        assert "1.0 kB is free" in text
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_neither_folder_nor_to_be_had(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_args: Any, **_options: Any) -> str:
        raise OSError("name resolution\nfailed")

    monkeypatch.setattr("checkpoint.files.model_folder.snapshot_download", unreachable)
    text = refusal(lambda: to_shards("some-org/some-model", tmp_path))
    assert "--model-name some-org/some-model" in text
    text = refusal(lambda: to_hf(originals / "ck", tmp_path / "hf", config_name="nowhere"))
    assert "--config-name nowhere" in text


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
    """Runs a script in this process, which gets back the log levels that the script sets."""
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
    weight(source / ST, HF_QKV, (96, 32), NAN)
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
    """One of them started as a user does: only errors would be on its stderr."""
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
