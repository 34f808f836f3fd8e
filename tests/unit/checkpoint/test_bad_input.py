"""Tests that a mistake in a conversion's files or flags gives a one-line error and no output.

The error names the mistake. The converters' other tests are in test_conversion.py.
"""

import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.files.layer_shards import load_layer_shard
from pipeline_parallel.partition.split import Split
from tests.support.checkpoint_models import (
    cut,
    edit_json,
    edit_weights,
    family,
    make_predecessors,
    reseal,
    to_hf,
    to_shards,
)
from tests.support.refusal import RunsCode, check_refused

NAN = float("nan")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yields a working folder; afterwards, checks that no pickled code ran and `out` is empty."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("out/*"))


Spoil = Callable[[Path], object]


def weight(key: str, *shape: int, fill: float = 0.0) -> Spoil:
    return partial(edit_weights, changes={key: torch.full(shape, fill)})


def edited(**changes: Any) -> Spoil:
    return partial(edit_json, **changes)


def drop(key: str) -> Spoil:
    return partial(edit_weights, changes={key: None})


def written(content: bytes) -> Spoil:
    return lambda path: path.write_bytes(content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_it_is(_path: Path) -> None:
    """Changes no file, because only the flags of the case are wrong."""


QKV = "attention.query_key_value.weight"
HF_QKV = f"gpt_neox.layers.1.{QKV}"
ST, BIN, CK = "model.safetensors", "pytorch_model.bin", "prank_1_checkpoint.pt"
INDEX, CONFIG, META = f"{ST}.index.json", "config.json", "meta.json"
FIRST, EMBEDDING = "model-00001-of-00011.safetensors", "gpt_neox.embed_in.weight"
CODE = {"weight": RunsCode()}
PICKLED = written(pickle.dumps(CODE, protocol=2))
LATER = written(pickle.dumps(CODE))
INT8 = partial(edit_weights, changes={HF_QKV: torch.ones(96, 32, dtype=torch.int8)})

# Format, a file of it, the damage to that file, and words of the error.
FROM_HF: dict[str, tuple[str, str, Spoil, list[str]]] = {
    "missing key": ("st", ST, drop(HF_QKV), [HF_QKV, "missing"]),
    "missing head": ("st", ST, drop("embed_out.weight"), ["embed_out.weight or lm_head.weight"]),
    "extra key": ("st", ST, weight("a.b", 2), [ST, "a.b", "unexpected"]),
    "block too many": ("st", ST, weight(f"gpt_neox.layers.3.{QKV}", 2), ["layers.3.", "unexp"]),
    "misshapen": ("st", ST, weight(HF_QKV, 5, 6), [HF_QKV, "(5, 6)", "(96, 32)"]),
    "integers": ("bin", BIN, INT8, [BIN, HF_QKV, "int8", "float32"]),
    "nan": ("st", ST, weight(HF_QKV, 96, 32, fill=NAN), [ST, HF_QKV, "not finite"]),
    "infinite": ("bin", BIN, weight(HF_QKV, 96, 32, fill=1 / 1e-320), [BIN, HF_QKV]),
    "two heads": ("st", ST, weight("lm_head.weight", 101, 32), ["lm_head.weight", "differs"]),
    "truncated safetensors": ("st", ST, cut, [ST, "not a complete safetensors file"]),
    "truncated bin": ("bin", BIN, cut, [BIN, "bytes are not a complete"]),
    "empty bin": ("bin", BIN, written(b""), [BIN, "0 bytes"]),
    "code": ("bin", BIN, PICKLED, [BIN, "refused", "posix.system"]),
    "code in a later protocol": ("bin", BIN, LATER, [BIN, "refused"]),
    "code in a zip": ("bin", BIN, partial(torch.save, CODE), [BIN, "refused", "posix.system"]),
    "no dict": ("bin", BIN, partial(torch.save, [1]), [BIN, "list", "dict of tensors"]),
    "no tensor": ("bin", BIN, partial(torch.save, {"a": 1}), [BIN, "a is int"]),
    "no weights": ("st", ST, Path.unlink, [ST, BIN, "expected one of"]),
    "file of the index missing": ("many", FIRST, Path.unlink, ["00001", "index.json names it"]),
    "key of the index missing": ("many", FIRST, drop(EMBEDDING), ["00001", EMBEDDING]),
    "broken index": ("many", INDEX, written(b"{"), [INDEX, "JSON"]),
    "no config": ("st", CONFIG, Path.unlink, [CONFIG, "no such"]),
    "other family": ("st", CONFIG, edited(model_type="gptj"), ["gptj'", "'gpt_neox'"]),
    "other width": ("st", CONFIG, edited(hidden_size=64), ["(101, 32)", "(101, 64)"]),
}


@pytest.mark.parametrize("name", FROM_HF)
def test_from_hf(name: str, originals: Path, here: Path) -> None:
    form, file, spoil, words = FROM_HF[name]
    source = shutil.copytree(originals / form, here / "in")
    spoil(source / file)
    check_refused(lambda: to_shards(source, here / "out"), *words)


SHARD = "pytorch_1.pt"
SHARDS: dict[str, tuple[Spoil, list[str]]] = {
    "missing key": (drop(QKV), [SHARD, QKV, "missing"]),
    "extra key": (weight("a.b", 2), [SHARD, "a.b", "unexpected"]),
    "misshapen": (weight(QKV, 3, 4), [QKV, "(3, 4)", "(96, 32)"]),
    "nan": (weight(QKV, 96, 32, fill=NAN), [SHARD, QKV, "not finite"]),
    "missing file": (Path.unlink, [SHARD, "no such file"]),
    "truncated": (cut, [SHARD, "bytes are not a complete"]),
    "code": (PICKLED, [SHARD, "refused", "posix.system"]),
    "a folder": (replace_by_folder, ["no such file"]),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards(name: str, originals: Path, here: Path) -> None:
    spoil, words = SHARDS[name]
    folder = shutil.copytree(originals / "shards", here / "in")
    spoil(folder / SHARD)
    neox = family("gptneox")
    config = neox.load_config(folder)
    check_refused(lambda: load_layer_shard(folder, neox, config, 2), *words)


Q0, LAYERS, NONE = f"0.{QKV}", "--n-layer-per-stage", (None, None)
# --n-stages, --n-layer-per-stage, a file of a step of stages 2,1, its damage, words of the error.
TO_HF: dict[str, tuple[int | None, Any, str, Spoil, list[str]]] = {
    "missing stage": (*NONE, CK, Path.unlink, [CK, "no such file"]),
    "missing key": (*NONE, CK, drop(Q0), [CK, Q0, "missing"]),
    "extra module": (*NONE, CK, weight(f"2.{QKV}", 96, 32), [CK, f"2.{QKV}"]),
    "misshapen": (*NONE, CK, weight(Q0, 4), [CK, "(4,)", "(96, 32)"]),
    "nan": (*NONE, CK, weight(Q0, 96, 32, fill=NAN), [CK, "not finite"]),
    "truncated": (*NONE, CK, cut, [CK, "bytes are not a complete"]),
    "code": (*NONE, CK, PICKLED, [CK, "refused", "posix.system"]),
    "other stages": (3, None, ".", as_it_is, ["--n-stages is 3", "meta.json says 2"]),
    "other layers": (None, 3, ".", as_it_is, [f"{LAYERS} is 3", "meta.json says 2"]),
    "by list": (None, (1, 2), ".", as_it_is, [f"{LAYERS} is 1,2", "meta.json says 2,1"]),
    "more": (None, (1, 1, 1), ".", as_it_is, [f"{LAYERS} is 1,1,1", "meta.json says 2,1"]),
    "stages unknown": (*NONE, ".", make_predecessors, ["--n-stages", "missing"]),
    "layers unknown": (2, None, ".", make_predecessors, [LAYERS, "missing"]),
    "too few stages": (1, 3, ".", make_predecessors, [CK, "--n-stages is 1"]),
    "too few layers": (2, 1, ".", make_predecessors, ["--n-stages 2", f"{LAYERS} 1", "3"]),
    "an empty stage": (2, 3, ".", make_predecessors, ["--n-stages 2", f"{LAYERS} 3", "3"]),
    "list of others": (
        3,
        (2, 1),
        ".",
        make_predecessors,
        [f"3 with {LAYERS} 2,1", "2 st", "3 lay"],
    ),
    "longer list": (None, (2, 2), ".", make_predecessors, [f"{LAYERS} 2,2", "4 lay", "3 lay"]),
    "another order": (None, (1, 2), ".", make_predecessors, ["prank_0_", "2.attention", "unexp"]),
    "other model's": (*NONE, META, edited(model_type="gptj"), ["'gptj'", "'gptneox'"]),
    "other depth's": (*NONE, META, edited(num_layers=[2, 2]), ["2,2", "a total of 4", "3"]),
    "an empty stage in meta": (*NONE, META, edited(num_layers=[3, 0]), [META, "[3, 0]"]),
    "fewer stages in meta": (*NONE, META, edited(num_layers=[3]), [META, "[3]", "2"]),
    "meta of no sense": (*NONE, META, edited(num_layers=3), [META, "num_layers is 3"]),
    "broken meta": (*NONE, META, written(b"{"), [META, "JSON"]),
    "no config": (*NONE, CONFIG, Path.unlink, ["--config-name is missing"]),
    "latest of no sense": (*NONE, "latest", written(b"x"), ["latest", "'x'"]),
    "latest to nowhere": (*NONE, "latest", written(b"8"), ["8/", "checkpoint_8/"]),
    "no folder": (*NONE, ".", shutil.rmtree, ["in", "no such folder"]),
}


@pytest.mark.parametrize("name", TO_HF)
def test_to_hf(name: str, originals: Path, here: Path) -> None:
    stages, layers, file, spoil, words = TO_HF[name]
    source = shutil.copytree(originals / "ck", here / "in")
    spoil(source / file)
    reseal(source)
    split = Split(layers) if isinstance(layers, tuple) else layers
    flags: dict[str, Any] = {"n_stages": stages, "n_layer_per_stage": split}
    check_refused(lambda: to_hf(source, here / "out" / "hf", **flags), *words)


def test_weights_beyond_fp16(originals: Path, here: Path) -> None:
    source = shutil.copytree(originals / "ck", here / "in")
    weight(Q0, 96, 32, fill=1e5)(source / CK)
    reseal(source)
    check_refused(lambda: to_hf(source, here / "out" / "hf", fp16=True), CK, "100000", "65504")
