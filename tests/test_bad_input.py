"""Every mistake that a user can make with training gets one line and exit status 2, on all ranks.

The line names the flag or file, the value, and what was expected. Flags are tested in this process;
what needs several ranks, or a machine that is not as it should be, in real ones.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import arguments
from argument_checks import NOT_BUILT_FLAGS, NOT_BUILT_VALUES
from checkpoint.convert_from_hf import convert_from_hf
from checkpoint.disk import check_disk
from checkpoint.lock import lock_folder
from comm.local import LocalCommunicator
from dist_clm_train import look_around
from modules.registry import MODELS
from tests.entry import Outcome, Rank, Run, quiet_port, run_all
from tests.runs import to_argv
from tests.tasks.material import make_texts, tokenizer, write_jsonl
from tests.tiny import make_hf

ROOT = Path(__file__).parents[1]
LAYERS, VOCAB = 3, 400
Flags = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with layer shards (m, and a GPT-J's in j), and data, good and bad."""
    folder = tmp_path_factory.mktemp("bad-input")
    for name, family, layers in (("m", "gptneox", "num_hidden_layers"), ("j", "gptj", "n_layer")):
        make_hf(family, vocab_size=VOCAB, **{layers: LAYERS}).save_pretrained(folder / "hf" / name)
        tokenizer().save_pretrained(folder / "hf" / name)
        convert_from_hf(
            MODELS[family].load(),
            model_name=str(folder / "hf" / name),
            save_dir=folder,
            dtype="keep",
        )
    write_jsonl(folder / "data.jsonl", make_texts(60, seed=1))
    good = '{"text": "the"}\n'
    (folder / "broken.jsonl").write_text(good * 4200 + '{"Text": "no"}\n')
    (folder / "broken-at-once.jsonl").write_text("nonsense\n")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    return folder


def right(home: Path) -> Flags:
    """Flags with nothing wrong in them."""
    return {
        "model-name": home / "m",
        "model-type": "gptneox",
        "num-layers": 2,
        "embedding-dim": 32,
        "task-name": home / "data.jsonl",
        "seq-length": 24,
        "batch-size": 2,
        "total-steps": 2,
        "world-size": 4,
        "rank": 0,
        "pipeline-group-size": 2,
        "data-group-size": 2,
        "join-timeout": 60,
        "dist-timeout": 60,
        "checkpoint-path": home / "runs" / "unused",
    }


def argv(flags: Flags) -> list[str]:
    """A flag that is None is left out."""
    return to_argv({flag: value for flag, value in flags.items() if value is not None})


@dataclass(frozen=True)
class Case:
    """Flags that differ from the right ones, and what the line must hold; {home} is the folder."""

    flags: Flags
    words: Sequence[str]
    environ: Mapping[str, str] = field(default_factory=dict)


def number_cases() -> dict[str, Case]:
    whole = "expected a whole number of at least"
    wrong: dict[str, tuple[str, ...]] = {
        "embedding-dim": ("0", "x"),
        "world-size": ("0", "2.5"),
        "rank": ("-1",),
        "pipeline-group-size": ("0",),
        "data-group-size": ("two",),
        "cuda-id": ("-1",),
        "total-steps": ("0", "1e3"),
        "warmup-steps": ("-1",),
        "batch-size": ("0",),
        "micro-batch-size": ("0",),
        "gradient-accumulate-step": ("0",),
        "seq-length": ("1",),
        "checkpoint-steps": ("-5",),
        "evaluation-steps": ("-1",),
        "evaluation-num-batch": ("0",),
        "seed": ("-1", "0x10"),
        "train-warmup-steps": ("-1",),
        "loss-scale-window": ("0",),
        "hysteresis": ("0",),
        "max-skipped-updates": ("0",),
    }
    cases = {
        f"{flag} {value}": Case({flag: value}, [f"--{flag}: {whole}", repr(value)])
        for flag, values in wrong.items()
        for value in values
    }
    for flag, value in (
        ("lr", "-1"), ("lr", "nan"), ("lr", "fast"), ("weight-decay", "-0.1"), ("min-lr", "-1"),
        ("loss-scale", "-1"),
    ):  # fmt: skip
        words = [f"--{flag}: expected a number of at least 0", repr(value)]
        cases[f"{flag} {value}"] = Case({flag: value}, words)
    for flag, value in (
        ("max-grad-norm", "0"), ("join-timeout", "0"), ("dist-timeout", "-3"),
        ("initial-loss-scale", "0"), ("min-loss-scale", "0"),
    ):  # fmt: skip
        words = [f"--{flag}: expected a number above 0", repr(value)]
        cases[f"{flag} {value}"] = Case({flag: value}, words)
    for flag in ("lr", "weight-decay", "join-timeout", "dist-timeout"):
        words = [f"--{flag}: expected a ", "'inf'"]
        cases[f"{flag} infinite"] = Case({flag: "inf"}, words)
    return cases


FLAG_CASES: dict[str, Case] = {
    **number_cases(),
    "time beyond all clocks": Case({"dist-timeout": "1e300"}, ["--dist-timeout: ", "'1e300'"]),
    "join time beyond all clocks": Case({"join-timeout": "1e10"}, ["--join-timeout: ", "'1e10'"]),
    "an unknown flag": Case(
        {"learning-rate": "1"}, ["--learning-rate 1", "unrecognized", "--help"]
    ),
    "an abbreviated flag": Case({"batch": "1"}, ["--batch 1", "unrecognized"]),
    "no model": Case({"model-name": None}, ["--model-name", "required"]),
    "no model type": Case({"model-type": None}, ["--model-type", "required"]),
    "no layers": Case({"num-layers": None}, ["--num-layers", "required"]),
    "no width": Case({"embedding-dim": None}, ["--embedding-dim", "required"]),
    "no data": Case({"task-name": None}, ["--task-name", "required"]),
    "no steps": Case({"total-steps": None}, ["--total-steps", "required"]),
    "an unknown family": Case({"model-type": "llama"}, ["--model-type", "'llama'", "gptneox"]),
    "another schedule": Case({"pp-mode": "interleaved"}, ["--pp-mode", "'interleaved'", "gpipe"]),
    "another dp mode": Case({"dp-mode": "zero"}, ["--dp-mode", "'zero'", "allreduce"]),
    "another optimizer": Case({"optimizer": "sgd"}, ["--optimizer", "'sgd'", "adam"]),
    "two precisions": Case({"fp16": "true", "bf16": "true"}, ["--fp16", "--bf16", "at most one"]),
    "fp16 what": Case({"fp16": "yes"}, ["--fp16", "true or false", "'yes'"]),
    "a lowest rate above the highest": Case(
        {"min-lr": "2e-5", "lr": "1e-5"}, ["--min-lr 2e-05", "at most --lr 1e-05"]
    ),
    "a lowest rate that is never met": Case(
        {"min-lr": "1e-6", "lr-schedule": "constant"}, ["--min-lr 1e-06", "--lr-schedule constant"]
    ),
    "a smallest scale above the first": Case(
        {"min-loss-scale": 4, "initial-loss-scale": 2},
        ["--min-loss-scale 4", "at most --initial-loss-scale 2"],
    ),
    "more of zero": Case({"zero-stage": 2}, ["--zero-stage", "2", "0, 1"]),
    "schedule by steps": Case({"lr-schedule": "step"}, ["--lr-schedule", "'step'", "cosine"]),
    "another dp backend": Case({"dp-backend": "mpi"}, ["--dp-backend", "'mpi'", "nccl", "gloo"]),
    "another backend": Case({"dist-backend": "mpi"}, ["--dist-backend", "'mpi'", "cupy_nccl"]),
    "another profiler": Case({"profiling": "yes"}, ["--profiling", "'yes'", "no-profiling"]),
    "no switch": Case({"use-cuda": "maybe"}, ["--use-cuda", "true or false", "'maybe'"]),
    "recompute what": Case({"recompute": "1"}, ["--recompute", "true or false", "'1'"]),
    "load what": Case({"load-checkpoint": "no"}, ["--load-checkpoint", "true or false", "'no'"]),
    "load nothing": Case(
        {"load-pretrained-model": "0"}, ["--load-pretrained-model", "true or false", "'0'"]
    ),
    "no whole layers": Case({"num-layers": "2.0"}, ["--num-layers 2.0", "whole number"]),
    "no layers at all": Case({"num-layers": "0"}, ["--num-layers 0", "at least 1"]),
    "negative layers": Case({"num-layers": "-2"}, ["--num-layers", "-2", "at least 1"]),
    "layers by list": Case({"num-layers": "2,1"}, ["--num-layers 2,1", "is not built yet"]),
    "layers by themselves": Case({"num-layers": "auto"}, ["--num-layers auto", "not built yet"]),
    "too few layers": Case({"num-layers": "1"}, ["--num-layers 1", "2 stages", "2 layers", "3"]),
    "an empty stage": Case({"num-layers": "3"}, ["--num-layers 3", "2 stages", "stage 1 none"]),
    "world of another size": Case(
        {"world-size": 3}, ["--world-size 3", "--pipeline-group-size 2", "--data-group-size 2"]
    ),
    "rank outside": Case({"rank": 4}, ["--rank 4", "less than --world-size 4"]),
    "microbatch that does not divide": Case(
        {"micro-batch-size": 3}, ["--micro-batch-size 3", "divide", "--batch-size 2"]
    ),
    "accumulation that does not divide": Case(
        {"gradient-accumulate-step": 4},
        ["--gradient-accumulate-step 4", "divide", "--total-steps 2"],
    ),
    "warm-up too long": Case({"warmup-steps": 3}, ["--warmup-steps 3", "only 2 updates"]),
    "url without a port": Case({"dist-url": "tcp://a"}, ["--dist-url tcp://a", "tcp://host:port"]),
    "url of the web": Case({"dist-url": "http://a:1"}, ["--dist-url http://a:1", "tcp://host:p"]),
    "url's port too high": Case({"dist-url": "tcp://a:70000"}, ["--dist-url", "70000", "65535"]),
    "url's port zero": Case({"dist-url": "tcp://a:0"}, ["--dist-url", "tcp://a:0", "from 1"]),
    "unknown host": Case(
        {"dist-url": "tcp://no-such-host.invalid:1"}, ["--dist-url", "no-such-host.invalid"]
    ),
    "unknown interface": Case(
        {"net-interface": "eth77"}, ["--net-interface eth77", "no such interface", "lo"]
    ),
    "interface against gloo's": Case(
        {"net-interface": "lo"},
        ["--net-interface lo", "GLOO_SOCKET_IFNAME is eth77", "must be the same; there are lo"],
        {"GLOO_SOCKET_IFNAME": "eth77"},
    ),
    "interface against nccl's": Case(
        {"net-interface": "lo"},
        ["--net-interface lo", "NCCL_SOCKET_IFNAME is eth77"],
        {"NCCL_SOCKET_IFNAME": "eth77"},
    ),
    "unknown interface in the environment": Case(
        {}, ["GLOO_SOCKET_IFNAME eth77", "lo"], {"GLOO_SOCKET_IFNAME": "eth77"}
    ),
    "torchrun's rank": Case(
        {"rank": None}, ["RANK", "'x'", "whole number"], {"TORCHELASTIC_RUN_ID": "1", "RANK": "x"}
    ),
    "torchrun's negative rank": Case(
        {"rank": None}, ["RANK", "'-1'", "whole number"], {"TORCHELASTIC_RUN_ID": "1", "RANK": "-1"}
    ),
    "torchrun's world": Case(
        {"world-size": None},
        ["WORLD_SIZE", "'four'", "whole number"],
        {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "four"},
    ),
    "torchrun's local rank": Case(
        {"cuda-id": None},
        ["LOCAL_RANK", "''", "whole number"],
        {"TORCHELASTIC_RUN_ID": "1", "LOCAL_RANK": ""},
    ),
    "torchrun's port": Case(
        {},
        ["--dist-url tcp://127.0.0.1:http", "tcp://host:port"],
        {"TORCHELASTIC_RUN_ID": "1", "MASTER_PORT": "http"},
    ),
    "no model folder": Case({"model-name": "{home}/none"}, ["--model-name", "{home}/none"]),
    "model a file": Case({"model-name": "{home}/file"}, ["--model-name", "{home}/file", "folder"]),
    "model without config": Case({"model-name": "{home}/empty"}, ["--model-name", "config.json"]),
    "model of another family": Case(
        {"model-type": "gptj"}, ["--model-type gptj", "'gptj'", "config.json", "'gpt_neox'"]
    ),
    "another width": Case(
        {"embedding-dim": 64}, ["--embedding-dim 64", "{home}/m/config.json", "32"]
    ),
    "blocks too long": Case(
        {"seq-length": 65}, ["--seq-length 65", "{home}/m/config.json", "at most 64"]
    ),
    "blocks too long for GPT-J": Case(
        {"model-type": "gptj", "model-name": "{home}/j", "seq-length": 65},
        ["--seq-length 65", "{home}/j/config.json", "at most 64"],
    ),
    "data of no name": Case({"task-name": "a,,b"}, ["--task-name", "'a,,b'", "empty"]),
    "data of no weight": Case({"task-name": "a:0"}, ["--task-name", "a:0", "positive"]),
    "data of a weight that is none": Case(
        {"task-name": "a:nan"}, ["--task-name", "a:nan", "finit"]
    ),
    "data of a negative weight": Case({"task-name": "a:-1"}, ["--task-name", "a:-1", "positive"]),
    "no data file": Case(
        {"task-name": "{home}/no.jsonl"}, ["--task-name", "{home}/no.jsonl", "no such file"]
    ),
    "an unknown task": Case({"task-name": "books"}, ["--task-name", "books", "cot", ".jsonl"]),
    "data of a later kind": Case({"task-name": "a.parquet"}, ["--task-name", "parquet", "not bui"]),
    "a later task": Case({"task-name": "pile"}, ["--task-name pile is not built yet"]),
    "an empty data folder": Case(
        {"task-name": "{home}/empty"}, ["--task-name", "{home}/empty", ".jsonl"]
    ),
    "cot that is not there": Case({"task-name": "cot"}, ["mmlu-cot.json", "data"]),
    "no evaluation data": Case(
        {"evaluation-data": "{home}/no.jsonl"},
        ["--evaluation-data", "{home}/no.jsonl", "no such file"],
    ),
    "checkpoints in a file": Case(
        {"checkpoint-path": "{home}/file"},
        ["--checkpoint-path", "{home}/file", "cannot be written"],
    ),
}


@pytest.mark.parametrize("case", FLAG_CASES.values(), ids=FLAG_CASES.keys())
def test_a_flag(
    case: Case,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # where there is no data/mmlu-cot.json
    flags = right(home) | {flag: _at(home, value) for flag, value in case.flags.items()}
    line = refusal(argv(flags), case.environ, monkeypatch, capsys)
    assert all(_at(home, word) in line for word in case.words), line


def test_a_missing_bitsandbytes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen before torch is imported, and not looked for where it is not needed."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = refusal(argv(right(home) | {"optimizer": "8bit-adam"}), {}, monkeypatch, capsys)
    assert line.startswith("--optimizer 8bit-adam needs bitsandbytes")
    assert "pip install bitsandbytes" in line


def _at(home: Path, value: Any) -> Any:
    return value.replace("{home}", str(home)) if isinstance(value, str) else value


def refusal(
    arguments_given: list[str],
    environ: Mapping[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """The one line that this process would end with, with status 2."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, environ.get(variable, ""))  # else the choice would stay
    with pytest.raises(SystemExit) as ended:
        start_alone(arguments_given, environ)
    assert ended.value.code == 2
    return the_line(capsys.readouterr().err)


def start_alone(arguments_given: list[str], environ: Mapping[str, str]) -> None:
    """What a process does before it meets others, who would be told its problem."""
    machine = look_around(arguments.parse_train(arguments_given, environ))
    if machine.lock is not None:
        machine.lock.close()
    assert machine.problem is not None, "the mistake was not seen"
    arguments.refuse(machine.problem)


def the_line(stderr: str) -> str:
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    assert len(stderr) < 600, stderr
    return stderr.rstrip("\n")


@pytest.mark.parametrize("flag", NOT_BUILT_FLAGS)
def test_a_flag_that_is_not_built(
    flag: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([flag], [flag, "1"], [f"{flag}=x y"]):
        line = refusal([*argv(right(home)), *given], {}, monkeypatch, capsys)
        assert line == f"{flag} is not built yet"
    assert flag in arguments.train_parser().format_help()


@pytest.mark.parametrize("flag", NOT_BUILT_VALUES)
def test_a_value_that_is_not_built(
    flag: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in NOT_BUILT_VALUES[flag]:
        line = refusal([*argv(right(home)), flag, value], {}, monkeypatch, capsys)
        assert line == f"{flag} {value} is not built yet"


CONVERTERS: dict[str, tuple[Callable[..., object], list[str], list[str]]] = {
    "from: no model": (
        arguments.parse_convert_from_hf, ["--save-dir", "a"], ["--model-name", "required"],
    ),
    "from: no place": (
        arguments.parse_convert_from_hf, ["--model-name", "a"], ["--save-dir", "required"],
    ),
    "from: another type": (
        arguments.parse_convert_from_hf,
        ["--model-name", "a", "--save-dir", "b", "--dtype", "int8"],
        ["--dtype", "'int8'", "keep", "fp16", "bf16", "fp32"],
    ),
    "from: an unknown flag": (
        arguments.parse_convert_from_hf,
        ["--model-name", "a", "--save-dir", "b", "--offload"],
        ["--offload", "unrecognized"],
    ),
    "to: no checkpoint": (
        arguments.parse_convert_to_hf, ["--save-path", "a"], ["--ckpt-path", "required"],
    ),
    "to: no place": (
        arguments.parse_convert_to_hf, ["--ckpt-path", "a"], ["--save-path", "required"],
    ),
    "to: no stages": (
        arguments.parse_convert_to_hf,
        ["--ckpt-path", "a", "--save-path", "b", "--n-stages", "0"],
        ["--n-stages", "whole number of at least 1", "'0'"],
    ),
    "to: no layers": (
        arguments.parse_convert_to_hf,
        ["--ckpt-path", "a", "--save-path", "b", "--n-layer-per-stage", "few"],
        ["--n-layer-per-stage", "whole number of at least 1", "'few'"],
    ),
    "to: no switch": (
        arguments.parse_convert_to_hf,
        ["--ckpt-path", "a", "--save-path", "b", "--fp16", "yes"],
        ["--fp16", "true or false", "'yes'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTERS.values(), ids=CONVERTERS.keys())
@pytest.mark.parametrize("family", ["gptj", "gptneox"])
def test_a_converters_flag(
    family: str,
    case: tuple[Callable[..., object], list[str], list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    parse, given, words = case
    with pytest.raises(SystemExit) as ended:
        parse(family, given)
    assert ended.value.code == 2
    line = the_line(capsys.readouterr().err)
    assert all(word in line for word in words), line


def test_right_flags_are_right(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    machine = look_around(arguments.parse_train(argv(right(home)), {}))
    assert machine.problem is None
    assert machine.lock is not None
    machine.lock.close()


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ValueError) as caught:
        check_disk(LocalCommunicator(), tmp_path / "not" / "there", needed=2 * 10**6)
    assert all(
        word in str(caught.value)
        for word in ("--checkpoint-path", str(tmp_path / "not" / "there"), "2.00 MB", "1.00 MB")
    )
    check_disk(LocalCommunicator(), tmp_path, needed=10**5)


# ---- real processes ----


def commands(*given: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """What a user would start, all at once, with nothing but this process's environment."""
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "dist_clm_train.py"), *one],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={key: value for key, value in os.environ.items() if key != "TORCH_CPP_LOG_LEVEL"}
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        for one in given
    ]  # fmt: skip
    ended = [(process, *process.communicate(timeout=150)) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, out, err) for p, out, err in ended]


def test_a_command_with_a_wrong_flag(home: Path) -> None:
    flags = [right(home) | {"rank": rank, "lr": "fast"} for rank in range(4)]
    for done in commands(*map(argv, flags)):
        assert done.returncode == 2
        assert the_line(done.stderr) == "--lr: expected a number of at least 0, got 'fast'"


def test_a_command_with_a_shard_that_one_rank_lacks(home: Path) -> None:
    """Nothing but our line on stderr, of torch's C++ side either."""
    model = copy_of(home, "command")
    (model / "pytorch_lm_head.pt").unlink()
    flags = right(home) | {"dist-url": f"tcp://127.0.0.1:{quiet_port()}"}
    flags["checkpoint-path"] = home / "runs" / "command"
    ranks = [flags | {"rank": rank} for rank in range(4)]
    ranks[3]["model-name"] = model
    path = model / "pytorch_lm_head.pt"
    for rank, done in enumerate(commands(*map(argv, ranks))):
        assert done.returncode == 2
        assert the_line(done.stderr) == ("" if rank == 3 else f"rank {rank}: ") + (
            f"rank 3: {path}: no such file"
        )


def test_flags_are_refused_before_torch_is_imported() -> None:
    code = "import sys, dist_clm_train\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def copy_of(home: Path, name: str) -> Path:
    return Path(shutil.copytree(home / "m", home / "copies" / name))


QKV, LAST = "attention.query_key_value.weight", "pytorch_2.pt"  # of stage 1


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class RunsCode:
    """A pickle of it makes a file where it is read."""

    def __reduce__(self) -> Any:
        return (os.system, ("touch ran",))


def spoil_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


Spoil = Callable[[Path], object]

# What is wrong with the model folder of one rank, and the words of the line.
FOLDERS: dict[str, tuple[int, Spoil, list[str]]] = {
    "shard missing": (3, lambda d: (d / LAST).unlink(), [LAST, "no such file"]),
    "embedding missing": (2, lambda d: (d / "pytorch_embs.pt").unlink(), ["pytorch_embs.pt"]),
    "shard truncated": (1, lambda d: cut(d / LAST), [LAST, "bytes that are no whole"]),
    "key too many": (
        3, lambda d: edit(d / LAST, lambda s: s.update(a=torch.ones(1))), [LAST, "a unexpected"],
    ),
    "key missing": (3, lambda d: edit(d / LAST, lambda s: s.pop(QKV)), [LAST, QKV, "missing"]),
    "misshapen": (
        1,
        lambda d: edit(d / LAST, lambda s: s.update({QKV: torch.ones(4, 5)})),
        [LAST, QKV, "(4, 5)", "(96, 32)"],
    ),
    "not finite": (
        1, lambda d: edit(d / LAST, lambda s: s[QKV][0].fill_(float("nan"))),
        [LAST, QKV, "not finite"],
    ),
    "a pickle that runs code": (
        3,
        lambda d: (d / LAST).write_bytes(pickle.dumps({"a": RunsCode()}, protocol=2)),
        [LAST, "refused", "posix.system"],
    ),
    "a zip that runs code": (
        1, lambda d: torch.save({"a": RunsCode()}, d / LAST), [LAST, "refused", "posix.system"],
    ),
    "another shard than replica 0's": (
        3,
        lambda d: edit(d / LAST, lambda s: s[QKV][0].add_(1e-7)),
        ["--model-name", "stage 1", "not the same for all replicas"],
    ),
    "another config": (
        3, lambda d: edit_config(d, layer_norm_eps=1e-6),
        ["--model-name", "config.json is not the same on rank 0 and rank 3"],
    ),
    "config of another width": (
        2, lambda d: edit_config(d, hidden_size=64), ["--embedding-dim 32", "config.json", "64"],
    ),
    "config broken": (1, lambda d: cut(d / "config.json"), ["--model-name", "config.json"]),
    "a rope scaling": (
        3,
        lambda d: edit_config(d, rope_scaling={"rope_type": "linear", "factor": 2.0}),
        ["config.json", "rope", "'linear'", "not built"],
    ),
    "no tokenizer": (
        0, drop_tokenizer,
        ["--tokenizer-name", "no tokenizer files"],
    ),
    "no end of text": (
        0, lambda d: spoil_tokenizer(d, eos_token=None), ["--tokenizer-name", "eos_token"],
    ),
}  # fmt: skip


def on_all(flags: Flags) -> dict[int, Flags]:
    return dict.fromkeys(range(4), flags)


# Flags of some ranks that differ from the right ones, and the words of the line.
FLAGS: dict[str, tuple[dict[int, Flags], list[str]]] = {
    "another lr": (
        {2: {"lr": 0.5}},
        ["--lr must be the same on all ranks", "1e-05 on rank 0", "0.5 on rank 2"],
    ),
    "held-out data on rank 0 alone": (
        {0: {"evaluation-data": "{home}/data.jsonl"}},
        ["--evaluation-data must be the same on all ranks", "true on rank 0", "false on rank "],
    ),
    "no data on rank 0": (
        {0: {"task-name": "{home}/no.jsonl"}},
        ["--task-name", "{home}/no.jsonl", "no such file"],
    ),
    "a bad line of data": (
        {0: {"task-name": "{home}/broken-at-once.jsonl"}},
        ["{home}/broken-at-once.jsonl:1", "not JSON"],
    ),
    "a bad line in the middle of training": (
        on_all(
            {
                "task-name": "{home}/broken.jsonl", "seq-length": 64, "batch-size": 8,
                "total-steps": 200,
            },
        ),
        ["{home}/broken.jsonl:4201", '"text"'],
    ),
    "a bad line of held-out data": (
        on_all({"evaluation-data": "{home}/broken-at-once.jsonl"}),
        ["{home}/broken-at-once.jsonl:1", "not JSON"],
    ),
    "a GPU that is not there": (
        on_all({"use-cuda": "true"}), ["--use-cuda true", "0 CUDA devices"],
    ),
    "an interface that is not there": (
        {2: {"net-interface": "eth77"}}, ["--net-interface eth77", "no such interface", "lo"],
    ),
    "rank twice": ({3: {"rank": 2}}, ["--rank 2", "two processes have it"]),
    "a file for a folder": (
        {1: {"checkpoint-path": "{home}/file"}},
        ["--checkpoint-path", "{home}/file", "cannot be written"],
    ),
    "a tokenizer from nowhere": (
        {0: {"tokenizer-name": "no-such/tokenizer"}},
        ["--tokenizer-name no-such/tokenizer", "expected a folder"],
    ),
    "a longer tokenizer": (
        {0: {"tokenizer-name": "{home}/longer"}},
        ["--tokenizer-name", "{home}/longer", "401", "vocabulary of 400"],
    ),
    "another run's checkpoints": (
        {0: {"checkpoint-path": "{home}/locked"}},
        ["--checkpoint-path", "{home}/locked", f"in use by process {os.getpid()}"],
    ),
}  # fmt: skip

# Flags of a second start on a checkpoint of the first, and the words of the line.
RESUMES: dict[str, tuple[Flags, list[str]]] = {
    "another seed": ({"seed": 7}, ["--seed is 7", "made with 42"]),
    "another batch": ({"batch-size": 4}, ["the global batch", "is 8", "made with 4"]),
    "other blocks": ({"seq-length": 16}, ["--seq-length is 16", "made with 24"]),
    "other data": ({"task-name": "{home}/broken.jsonl"}, ["--task-name is", "made with"]),
    "no resume wanted": (
        {"load-checkpoint": "false"}, ["--load-checkpoint false", "--checkpoint-path"],
    ),
}  # fmt: skip
STATES: dict[str, tuple[Spoil, list[str]]] = {
    "optimizer of nonsense": (
        lambda d: torch.save([1], d / "2" / "prank_1_optimizer.pt"),
        ["prank_1_optimizer.pt", "list"],
    ),
    "weights with NaN": (
        lambda d: edit(
            d / "2" / "prank_1_checkpoint.pt", lambda s: s[f"0.{QKV}"].fill_(float("nan"))
        ),
        ["prank_1_checkpoint.pt", QKV, "not finite"],
    ),
    "weights of a stage missing": (
        lambda d: (d / "2" / "prank_1_checkpoint.pt").unlink(),
        ["--checkpoint-path", "no step is whole", "stage 0 has 2", "stage 1 has none"],
    ),
    "meta broken": (lambda d: cut(d / "2" / "meta.json"), ["meta.json", "not readable"]),
    "config of the checkpoint broken": (
        lambda d: cut(d / "2" / "config.json"),
        ["2/config.json", "not readable"],
    ),
    "config of the checkpoint missing": (
        lambda d: (d / "2" / "config.json").unlink(),
        ["--checkpoint-path"],
    ),
}


def ranks_of(home: Path, name: str, changes: Mapping[int, Flags]) -> list[Rank]:
    """Four ranks; their working directory is the run's own."""
    folder = home / "work" / _slug(name)
    folder.mkdir(parents=True)
    flags = right(home) | {
        "dist-url": f"tcp://127.0.0.1:{quiet_port()}",
        "checkpoint-path": folder / "checkpoints",
    }
    own = [
        flags | {"rank": rank} | {k: _at(home, v) for k, v in changes.get(rank, {}).items()}
        for rank in range(4)
    ]
    return [Rank(argv(one), folder) for one in own]


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("'", "")


LATE = "another lr, seen before all are there"


def first_runs(home: Path, busy: str) -> list[list[Run]]:
    """A run for each mistake in FOLDERS and FLAGS, and those of a rank that is alone."""
    chains = []
    for name, (rank, spoil, _) in FOLDERS.items():
        model = copy_of(home, _slug(name))
        spoil(model)
        chains.append([Run(name, ranks_of(home, name, {rank: {"model-name": model}}))])
    for name, (changes, _) in FLAGS.items():
        chains.append([Run(name, ranks_of(home, name, changes))])
    ranks = ranks_of(home, LATE, {2: {"lr": 0.5}})
    chains.append([Run(LATE, [*ranks[:3], replace(ranks[3], late=2.0)])])
    alone: dict[str, Flags] = {
        "a port in use": {"dist-url": busy},
        "a master that does not listen": {
            "rank": 1, "dist-url": f"tcp://127.0.0.1:{quiet_port()}", "join-timeout": 2,
        },
        "a master that another program is": {"rank": 1, "dist-url": busy, "join-timeout": 2},
        "a GPU that one process lacks": {
            "cuda-id": 5, "use-cuda": "true", "world-size": 1, "pipeline-group-size": 1,
            "data-group-size": 1, "num-layers": LAYERS,
        },
    }  # fmt: skip
    for name, flags in alone.items():
        ranks = ranks_of(home, name, {0: flags})
        chains.append([Run(name, ranks[:1])])
    return chains


@pytest.fixture(scope="module")
def ended(home: Path) -> dict[str, list[Outcome]]:
    """How all runs ended."""
    tokenizer().save_pretrained(home / "longer")
    path = home / "longer" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["unheard-of"] = VOCAB
    path.write_text(json.dumps(content))
    lock = lock_folder(home / "locked")
    with lock, socket.create_server(("127.0.0.1", 0)) as busy:
        url = f"tcp://127.0.0.1:{busy.getsockname()[1]}"
        chains = [[first_start(home)], *first_runs(home, url)]
        ends = run_all(chains, at_once=3, deadline=500.0)
    return ends | run_all(second_runs(home), at_once=3, deadline=300.0)


FIRST = "a first start"


def first_start(home: Path) -> Run:
    """Nothing is wrong; it takes over the lock of a process that is dead."""
    ranks = ranks_of(home, FIRST, {})
    made = home / "work" / _slug(FIRST) / "checkpoints"
    made.mkdir()
    (made / ".lock").write_text("process 4194305 on a-machine-that-was")
    return Run(FIRST, ranks)


def second_runs(home: Path) -> list[list[Run]]:
    """Starts with each mistake of RESUMES and STATES on what the first start has left."""
    chains = []
    more: Flags = {"total-steps": 4}
    for name in [*RESUMES, *STATES]:
        flags = more | (RESUMES[name][0] if name in RESUMES else {})
        ranks = ranks_of(home, name, on_all(flags))
        made = home / "work" / _slug(name) / "checkpoints"
        shutil.copytree(home / "work" / _slug(FIRST) / "checkpoints", made)
        if name in STATES:
            STATES[name][0](made)
        chains.append([Run(name, ranks)])
    return chains


def test_the_first_start_is_right(ended: dict[str, list[Outcome]]) -> None:
    for outcome in ended[FIRST]:
        assert (outcome.status, outcome.stderr) == (0, "")


def the_same_line(outcomes: list[Outcome]) -> str:
    """The line that every rank ends with, apart from the names of who says it and who saw it."""
    lines = []
    for rank, outcome in enumerate(outcomes):
        assert outcome.status == 2, outcome
        line = the_line(outcome.stderr).removeprefix(f"rank {rank}: ")
        line = re.sub(r"^rank [0-9]: ", "", line)
        lines.append(re.sub(r"--model-name \S+", "--model-name", line))  # may be each rank's own
        assert "Traceback" not in outcome.stdout
    assert len(set(lines)) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_model_folder(name: str, home: Path, ended: dict[str, list[Outcome]]) -> None:
    rank, _, words = FOLDERS[name]
    line = the_same_line(ended[name])
    assert all(word in line for word in words), line
    if "not the same" not in "".join(words):  # which several ranks see
        other = 1 if rank == 0 else 0
        assert f"rank {rank}: " in ended[name][other].stderr, "the others name the rank that saw it"
    assert not (home / "work" / _slug(name) / "ran").exists()


@pytest.mark.parametrize("name", FLAGS)
def test_flags_of_some_ranks(name: str, home: Path, ended: dict[str, list[Outcome]]) -> None:
    line = the_same_line(ended[name])
    assert all(_at(home, word) in line for word in FLAGS[name][1]), line
    if "middle" in name:
        assert "step 1/200" in ended[name][0].stdout


def test_a_late_rank_hears_of_it_too(ended: dict[str, list[Outcome]]) -> None:
    assert "--lr must be the same on all ranks" in the_same_line(ended[LATE])


@pytest.mark.parametrize("name", [*RESUMES, *STATES])
def test_a_second_start(name: str, home: Path, ended: dict[str, list[Outcome]]) -> None:
    line = the_same_line(ended[name])
    words = (RESUMES | STATES)[name][1]
    assert all(_at(home, word) in line for word in words), line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a port in use", ["--dist-url", "in use on this machine"]),
        ("a master that does not listen", ["--dist-url", "no answer within 2 s (--join-timeout)"]),
        ("a master that another program is", ["--dist-url", "another program", "--join-timeout"]),
        ("a GPU that one process lacks", ["--use-cuda true", "0 CUDA devices"]),
    ],
)
def test_a_rank_alone(name: str, words: list[str], ended: dict[str, list[Outcome]]) -> None:
    (outcome,) = ended[name]
    assert outcome.status == 2, outcome
    assert all(word in the_line(outcome.stderr) for word in words), outcome.stderr
    assert outcome.seconds < 30.0
