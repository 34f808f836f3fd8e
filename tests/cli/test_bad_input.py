"""Every mistake that a user can make with flags gets one line and exit status 2.

The line names the flag or file, the value, and what was expected. In this process; real processes
are in tests/lifecycle/test_bad_runs.py.
"""

import re
import shutil
import sys
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import pytest

from arguments import settings
from arguments.checks import warnings_about
from arguments.flag_table import FLAGS
from arguments.parser import refuse
from arguments.train import parse_train, train_parser
from comm.backends.single_process import SingleProcessCommunicator
from tests.support.valid_run import Flags, argv, at, make_home, right, the_line
from training.checkpointing import check_disk
from training.startup_checks import check_this_machine


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("bad-input"))


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
        ("lr", "-1"),
        ("lr", "nan"),
        ("lr", "fast"),
        ("weight-decay", "-0.1"),
        ("min-lr", "-1"),
        ("loss-scale", "-1"),
    ):
        words = [f"--{flag}: expected a number of at least 0", repr(value)]
        cases[f"{flag} {value}"] = Case({flag: value}, words)
    for flag, value in (
        ("max-grad-norm", "0"),
        ("join-timeout", "0"),
        ("dist-timeout", "-3"),
        ("initial-loss-scale", "0"),
        ("min-loss-scale", "0"),
    ):
        words = [f"--{flag}: expected a number above 0", repr(value)]
        cases[f"{flag} {value}"] = Case({flag: value}, words)
    for value in (
        "2.0",
        "0",
        "-2",
        "5,,3",
        ",",
        "2,",
        ",2",
        "",
        " ",
        "2, 1",
        "2;1",
        "2,0",
        "3,-1",
        "-1,3",
        "1e0",
        "2,auto",
        "auto ",
        "Auto",
        "auto,auto",
        "\u0662",
        "9" * 50,
    ):
        words = ["--num-layers: expected a whole number", "as in 5,3, or auto", repr(value)]
        cases[f"num-layers {value[:9]}"] = Case({"num-layers": value}, words)
    for flag in ("lr", "weight-decay", "join-timeout", "dist-timeout"):
        words = [f"--{flag}: expected a ", "'inf'"]
        cases[f"{flag} infinite"] = Case({flag: "inf"}, words)
    return cases


FLAG_CASES: dict[str, Case] = {
    **number_cases(),
    "time beyond all clocks": Case({"dist-timeout": "1e300"}, ["--dist-timeout: ", "'1e300'"]),
    "no time to save in": Case(
        {"dist-timeout": "4.9"}, ["--dist-timeout 4.9", "at least 5 seconds", "ranks that save"]
    ),
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
        {"fp16": "true", "min-loss-scale": 4, "initial-loss-scale": 2},
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
    "layers for too few stages": Case(
        {"num-layers": "1,1,1"}, ["--num-layers 1,1,1", "3 stages", "--pipeline-group-size is 2"]
    ),
    "layers for too many stages": Case(
        {"num-layers": "2,1", "pipeline-group-size": 4, "data-group-size": 1},
        ["--num-layers 2,1", "2 stages", "--pipeline-group-size is 4"],
    ),
    "a list of too few layers": Case(
        {"num-layers": "1,1"}, ["--num-layers 1,1", "holds 2 layers", "the model has 3"]
    ),
    "a list of too many layers": Case(
        {"num-layers": "2,2"}, ["--num-layers 2,2", "holds 4 layers", "the model has 3"]
    ),
    "more stages than layers, by themselves": Case(
        {"num-layers": "auto", "pipeline-group-size": 4, "data-group-size": 1},
        ["--num-layers auto", "4 stages", "none of the 3 layers"],
    ),
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
    "data of an unknown kind": Case({"task-name": "a.csv"}, ["--task-name", "a.csv", ".parquet"]),
    "no data folder": Case(
        {"task-name": "{home}/nowhere"}, ["--task-name", "{home}/nowhere", "no such file or folder"]
    ),
    "an empty data folder": Case(
        {"task-name": "{home}/empty"}, ["--task-name", "{home}/empty", ".jsonl"]
    ),
    "cot that is not there": Case({"task-name": "cot"}, ["mmlu-cot.json", "data"]),
    "no evaluation data": Case(
        {"evaluation-data": "{home}/no.jsonl"},
        ["--evaluation-data", "{home}/no.jsonl", "no such file"],
    ),
    "no second evaluation data": Case(
        {"evaluation-data": "{home}/data.jsonl,late={home}/no.jsonl"},
        ["--evaluation-data {home}/no.jsonl: there is no such file"],
    ),
    "two sets of one name": Case(
        {"evaluation-data": "{home}/data.jsonl,{home}/m/data.jsonl"},
        ["--evaluation-data", "{home}/data.jsonl", "{home}/m/data.jsonl", "named data", "name="],
    ),
    "a set of no name": Case(
        {"evaluation-data": "{home}/data.jsonl,={home}/data.jsonl"},
        ["--evaluation-data", "a name or a source is empty", "[name=]source"],
    ),
    "a set with a weight": Case(
        {"evaluation-data": "{home}/data.jsonl:0.3"},
        ["--evaluation-data {home}/data.jsonl:0.3", "takes no weight"],
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
    flags = right(home) | {flag: at(home, value) for flag, value in case.flags.items()}
    line = refusal(argv(flags), case.environ, monkeypatch, capsys)
    assert all(at(home, word) in line for word in case.words), line


DOUBTS: dict[str, tuple[Flags, list[str]]] = {
    "nothing": ({"fp16": "true"}, []),
    "an old warm-up": ({"train-warmup-steps": 3}, ["--train-warmup-steps does nothing"]),
    "no held-out data": ({"evaluation-steps": 3}, ["--evaluation-steps 3 does nothing"]),
    "giving up before the scale moves": (
        {"fp16": "true", "hysteresis": 10, "max-skipped-updates": 4},
        ["--max-skipped-updates 4 ends the run before"],
    ),
    "giving up as the scale moves": (
        {"fp16": "true", "hysteresis": 4, "max-skipped-updates": 4},
        ["--max-skipped-updates 4 ends the run before"],
    ),
    "one update at a lower scale": (
        {"fp16": "true", "hysteresis": 4, "max-skipped-updates": 5}, [],
    ),
    "a constant scale": (
        {"fp16": "true", "loss-scale": 8, "hysteresis": 10, "max-skipped-updates": 4}, [],
    ),
    "no scale": ({"hysteresis": 10, "max-skipped-updates": 4}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTS)
def test_what_is_hardly_meant_is_told(name: str, home: Path) -> None:
    flags, begins = DOUBTS[name]
    told = warnings_about(parse_train(argv(right(home) | flags), {}))
    assert [line.startswith(begin) for line, begin in zip(told, begins, strict=True)] == [
        True
    ] * len(begins)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_tells_it(
    rank: int, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = right(home) | {"evaluation-steps": 3, "rank": rank, "checkpoint-path": tmp_path / "c"}
    machine = check_this_machine(parse_train(argv(flags), {}))
    assert machine.problem is None
    if machine.lock is not None:
        machine.lock.close()
    assert ("--evaluation-steps 3 does nothing" in caplog.text) == (rank == 0)


def test_scale_flags_that_are_not_in_use_are_not_compared(home: Path) -> None:
    """A constant scale has no smallest, nor has fp32."""
    for flags in ({"fp16": "true", "loss-scale": 64}, {}):
        args = parse_train(argv(right(home) | flags | {"min-loss-scale": 65536}), {})
        assert args.precision.min_loss_scale == 65536.0


def test_a_missing_bitsandbytes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen before torch is imported, and not looked for where it is not needed."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    line = refusal(argv(right(home) | {"optimizer": "8bit-adam"}), {}, monkeypatch, capsys)
    assert line.startswith("--optimizer 8bit-adam needs bitsandbytes")
    assert "pip install bitsandbytes" in line


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
    machine = check_this_machine(parse_train(arguments_given, environ))
    if machine.lock is not None:
        machine.lock.close()
    assert machine.problem is not None, "the mistake was not seen"
    refuse(machine.problem)


def test_help_has_the_flags_that_most_runs_need_and_help_all_has_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            train_parser().parse_args([flag])
        assert ended.value.code == 0
        shown[flag] = set(re.findall(r"(?m)^  (--[a-z0-9-]+)", capsys.readouterr().out))
    assert {flag.name for flag in FLAGS} <= shown["--help-all"]
    assert {"--model-name", "--total-steps", "--rank", "--lr"} <= shown["--help"]
    assert not {"--hysteresis", "--job-token-file", "--zero-stage"} & shown["--help"]
    assert shown["--help"] < shown["--help-all"]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train_parser().parse_args(["--version"])
    assert ended.value.code == 0
    assert re.fullmatch(r"dist_clm_train \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_every_flag_is_a_field_of_one_group() -> None:
    """And every other field is derived, by name."""
    groups = get_type_hints(settings.Settings).values()
    names = [field.name for group in groups for field in fields(group)]
    assert len(names) == len(set(names))
    assert set(names) - {flag.dest for flag in FLAGS} == {"sources", "start_id", "agent_store"}
    assert {flag.dest for flag in FLAGS} <= set(names)


def test_right_flags_are_right(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    machine = check_this_machine(parse_train(argv(right(home)), {}))
    assert machine.problem is None
    assert machine.lock is not None
    machine.lock.close()


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ValueError) as caught:
        check_disk(SingleProcessCommunicator(), tmp_path / "not" / "there", needed=2 * 10**6)
    assert all(
        word in str(caught.value)
        for word in ("--checkpoint-path", str(tmp_path / "not" / "there"), "2.0 MB", "1.0 MB")
    )
    check_disk(SingleProcessCommunicator(), tmp_path, needed=10**5)
