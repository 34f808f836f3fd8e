"""Tests that every mistake with flags gives one error line and exit status 2.

The line names the flag or file, the value, and the expected value. These tests call the checks in
pytest's process; tests/lifecycle/test_bad_flags.py and test_bad_files.py start the program.
"""

import re
import shlex
import shutil
import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from arguments import settings
from arguments.checks import warnings_about
from arguments.flag_table import FLAGS
from arguments.parser import refuse
from arguments.train import parse_train, train_parser
from comm.backends.single_process import SingleProcessCommunicator
from tests.support.flags import flags_of
from tests.support.valid_run import Flags, argv, make_home, right, the_line
from training.checkpointing import check_disk
from training.startup_checks import check_this_machine


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("bad-input"))


# the expected kind of value | flags with wrong values
WRONG_NUMBERS = """
whole number of at least | embedding-dim 0 x | world-size 0 2.5 | rank -1 | cuda-id -1
whole number of at least | pipeline-group-size 0 | data-group-size two | total-steps 0 1e3
whole number of at least | batch-size 0 | micro-batch-size 0 | gradient-accumulate-step 0
whole number of at least | seq-length 1 | warmup-steps -1 | train-warmup-steps -1 | hysteresis 0
whole number of at least | checkpoint-steps -5 | evaluation-steps -1 | evaluation-num-batch 0
whole number of at least | loss-scale-window 0 | seed -1 0x10 | max-skipped-updates 0
number of at least 0 | lr -1 nan fast | weight-decay -0.1 | min-lr -1 | loss-scale -1
number above 0 | max-grad-norm 0 | join-timeout 0 | dist-timeout -3
number above 0 | initial-loss-scale 0 | min-loss-scale 0
finite number | lr inf | weight-decay inf | join-timeout inf | dist-timeout inf
"""
WRONG_LAYERS = ["2.0", "0", "-2", "5,,3", ",", "2,", ",2", "", " ", "2, 1", "2;1", "2,0", "3,-1"]
WRONG_LAYERS += ["-1,3", "1e0", "2,auto", "auto ", "Auto", "auto,auto", "\u0662", "9" * 50]
REQUIRED = ["model-name", "model-type", "num-layers", "embedding-dim", "task-name", "total-steps"]
# changes of the valid flags, in shell syntax | words of the error line; {home} is the folder
MISTAKES = """
--dist-timeout 1e300 | --dist-timeout: | '1e300'
--dist-timeout 4.9 | --dist-timeout 4.9 | at least 5 seconds | ranks that save
--join-timeout 1e10 | --join-timeout: | '1e10'
--learning-rate 1 | --learning-rate 1 | unrecognized | --help
--batch 1 | --batch 1 | unrecognized
--model-type mamba | --model-type | 'mamba' | gptneox
--pp-mode interleaved | --pp-mode | 'interleaved' | gpipe
--dp-mode zero | --dp-mode | 'zero' | allreduce
--optimizer sgd | --optimizer | 'sgd' | adam
--fp16 true --bf16 true | --fp16 | --bf16 | at most one
--fp16 yes | --fp16 | true or false | 'yes'
--min-lr 2e-5 --lr 1e-5 | --min-lr 2e-05 | at most --lr 1e-05
--min-lr 1e-6 --lr-schedule constant | --min-lr 1e-06 | --lr-schedule constant
--fp16 true --min-loss-scale 4 --initial-loss-scale 2 | --min-loss-scale 4 \
| at most --initial-loss-scale 2
--zero-stage 2 | --zero-stage | 2 | 0, 1
--lr-schedule step | --lr-schedule | 'step' | cosine
--dp-backend mpi | --dp-backend | 'mpi' | nccl | gloo
--dist-backend mpi | --dist-backend | 'mpi' | cupy_nccl
--profiling yes | --profiling | 'yes' | no-profiling
--use-cuda maybe | --use-cuda | true or false | 'maybe'
--recompute 1 | --recompute | true, false, selective or auto | '1'
--deterministic 1 | --deterministic | true or false | '1'
--load-checkpoint no | --load-checkpoint | true or false | 'no'
--load-pretrained-model 0 | --load-pretrained-model | true or false | '0'
--num-layers 1,1,1 | --num-layers 1,1,1 | 3 stages | --pipeline-group-size is 2
--num-layers 2,1 --pipeline-group-size 4 --data-group-size 1 | --num-layers 2,1 | 2 stages \
| size is 4
--num-layers 1,1 | --num-layers 1,1 | holds 2 layers | the model has 3
--num-layers 2,2 | --num-layers 2,2 | holds 4 layers | the model has 3
--num-layers auto --pipeline-group-size 4 --data-group-size 1 | --num-layers auto | 4 stages \
| none of the 3 layers
--num-layers 1 | --num-layers 1 | 2 stages | 2 layers | 3
--num-layers 3 | --num-layers 3 | 2 stages | stage 1 would hold none
--world-size 3 | --world-size 3 | --pipeline-group-size 2 | --data-group-size 2
--rank 4 | --rank 4 | less than --world-size 4
--micro-batch-size 3 | --micro-batch-size 3 | divide | --batch-size 2
--gradient-accumulate-step 4 | --gradient-accumulate-step 4 | divide | --total-steps 2
--warmup-steps 3 | --warmup-steps 3 | only 2 updates
--dist-url tcp://a | --dist-url tcp://a | tcp://host:port
--dist-url http://a:1 | --dist-url http://a:1 | tcp://host:p
--dist-url tcp://a:70000 | --dist-url | 70000 | 65535
--dist-url tcp://a:0 | --dist-url | tcp://a:0 | from 1
--dist-url tcp://no-such-host.invalid:1 | --dist-url | no-such-host.invalid
--net-interface eth77 | --net-interface eth77 | no such interface | lo
GLOO_SOCKET_IFNAME=eth77 --net-interface lo | --net-interface lo | GLOO_SOCKET_IFNAME is eth77 \
| must be the same; there are lo
NCCL_SOCKET_IFNAME=eth77 --net-interface lo | --net-interface lo | NCCL_SOCKET_IFNAME is eth77
GLOO_SOCKET_IFNAME=eth77 | GLOO_SOCKET_IFNAME eth77 | lo
TORCHELASTIC_RUN_ID=1 RANK=x --rank unset | RANK | 'x' | whole number
TORCHELASTIC_RUN_ID=1 RANK=-1 --rank unset | RANK | '-1' | whole number
TORCHELASTIC_RUN_ID=1 WORLD_SIZE=four --world-size unset | WORLD_SIZE | 'four' | whole number
TORCHELASTIC_RUN_ID=1 LOCAL_RANK= --cuda-id unset | LOCAL_RANK | '' | whole number
TORCHELASTIC_RUN_ID=1 MASTER_PORT=http | --dist-url tcp://127.0.0.1:http | tcp://host:port
--model-name {home}/none | --model-name | {home}/none
--model-name {home}/file | --model-name | {home}/file | folder
--model-name {home}/empty | --model-name | config.json
--model-type gptj | --model-type gptj | 'gptj' | config.json | 'gpt_neox'
--embedding-dim 64 | --embedding-dim 64 | {home}/m/config.json | 32
--seq-length 65 | --seq-length 65 | {home}/m/config.json | at most 64
--model-type gptj --model-name {home}/j --seq-length 65 | --seq-length 65 \
| {home}/j/config.json | at most 64
--task-name a,,b | --task-name | 'a,,b' | empty
--task-name a:0 | --task-name | a:0 | positive
--task-name a:nan | --task-name | a:nan | finit
--task-name a:-1 | --task-name | a:-1 | positive
--task-name {home}/no.jsonl | --task-name | {home}/no.jsonl | no such file
--task-name books | --task-name | books | cot | .jsonl
--task-name a.csv | --task-name | a.csv | .parquet
--task-name {home}/nowhere | --task-name | {home}/nowhere | no such file or folder
--task-name {home}/empty | --task-name | {home}/empty | .jsonl
--task-name cot | mmlu-cot.json | data
--evaluation-data {home}/no.jsonl | --evaluation-data | {home}/no.jsonl | no such file
--evaluation-data {home}/data.jsonl,late={home}/no.jsonl \
| --evaluation-data {home}/no.jsonl: there is no such file
--evaluation-data {home}/data.jsonl,{home}/m/data.jsonl | --evaluation-data | {home}/data.jsonl \
| {home}/m/data.jsonl | named data | name=
--evaluation-data {home}/data.jsonl,={home}/data.jsonl | --evaluation-data \
| a name or a source is empty | [name=]source
--evaluation-data {home}/data.jsonl:0.3 | --evaluation-data {home}/data.jsonl:0.3 | takes no weight
--checkpoint-path {home}/file | --checkpoint-path | {home}/file | cannot be written
"""


def mistakes() -> Iterator[tuple[str, str]]:
    """Yields pairs: a mistake in shell syntax, and words of its error line joined by " | "."""
    for line in WRONG_NUMBERS.strip().splitlines():
        expected, *flags = line.split(" | ")
        for flag, *values in map(str.split, flags):
            for value in values:
                yield f"--{flag} {value}", f"--{flag}: expected a {expected} | '{value}'"
    for value in WRONG_LAYERS:
        words = f"--num-layers: expected a whole number | as in 5,3, or auto | {value!r}"
        yield f"--num-layers {shlex.quote(value)}", words
    for flag in REQUIRED:
        yield f"--{flag} unset", f"--{flag} | required"
    for line in MISTAKES.strip().splitlines():
        wrong, _, words = line.partition(" | ")
        yield wrong, words


CASES = dict(mistakes())


@pytest.mark.parametrize("wrong", CASES)
def test_a_flag(
    wrong: str,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # this folder has no data/mmlu-cot.json
    parts = shlex.split(wrong.format(home=home))
    environ = dict(parts.pop(0).split("=", 1) for part in list(parts) if re.match("[A-Z_]+=", part))
    flags: Flags = {flag[2:]: value for flag, value in zip(parts[::2], parts[1::2], strict=True)}
    unset = dict.fromkeys(flag for flag, value in flags.items() if value == "unset")
    line = refusal(argv(right(home) | flags | unset), environ, monkeypatch, capsys)
    assert all(word in line for word in CASES[wrong].format(home=home).split(" | ")), line


# flags that are probably a mistake, and the start of the warning about them
DOUBTS = {
    "--fp16 true": "",
    "--train-warmup-steps 3": "--train-warmup-steps does nothing",
    "--evaluation-steps 3": "--evaluation-steps 3 does nothing",
    "--fp16 true --hysteresis 10 --max-skipped-updates 4": "--max-skipped-updates 4 ends the run",
    "--fp16 true --hysteresis 4 --max-skipped-updates 4": "--max-skipped-updates 4 ends the run",
    "--fp16 true --hysteresis 4 --max-skipped-updates 5": "",
    "--fp16 true --loss-scale 8 --hysteresis 10 --max-skipped-updates 4": "",
    "--hysteresis 10 --max-skipped-updates 4": "",
}


@pytest.mark.parametrize("flags", DOUBTS)
def test_what_is_hardly_meant_is_told(flags: str, home: Path) -> None:
    told = warnings_about(parse_train(argv(right(home) | flags_of(flags)), {}))
    assert len(told) == (DOUBTS[flags] != "")
    assert all(line.startswith(DOUBTS[flags]) for line in told)


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_alone_tells_it(
    rank: int, home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = right(home) | {"evaluation-steps": 3, "rank": rank, "checkpoint-path": tmp_path / "c"}
    assert problem_with(argv(flags), {}) is None
    assert ("--evaluation-steps 3 does nothing" in caplog.text) == (rank == 0)


def test_scale_flags_that_are_not_in_use_are_not_compared(home: Path) -> None:
    """fp32 and a constant loss scale do not use --min-loss-scale, so any value is accepted."""
    for flags in ({"fp16": "true", "loss-scale": 64}, {}):
        args = parse_train(argv(right(home) | flags | {"min-loss-scale": 65536}), {})
        assert args.precision.min_loss_scale == 65536.0


def test_a_missing_bitsandbytes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without bitsandbytes, --optimizer 8bit-adam is an error that names the install command."""
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
    """Checks that `start_alone` raises SystemExit with code 2, and returns the error line."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, environ.get(variable, ""))  # so that the test restores it
    with pytest.raises(SystemExit) as ended:
        start_alone(arguments_given, environ)
    assert ended.value.code == 2
    return the_line(capsys.readouterr().err)


def start_alone(arguments_given: list[str], environ: Mapping[str, str]) -> None:
    problem = problem_with(arguments_given, environ)
    assert problem is not None, "no mistake was found"
    refuse(problem)


def problem_with(arguments_given: list[str], environ: Mapping[str, str]) -> Exception | None:
    """Returns the problem that a process finds before the rendezvous, or None."""
    machine = check_this_machine(parse_train(arguments_given, environ))
    if machine.lock is not None:
        machine.lock.close()
    return machine.problem


def test_help_has_the_flags_that_most_runs_need_and_help_all_has_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = {
        flag: set(re.findall(r"(?m)^  (--[a-z0-9-]+)", printed_by(flag, capsys)))
        for flag in ("--help", "--help-all")
    }
    assert {flag.name for flag in FLAGS} <= shown["--help-all"]
    assert {"--model-name", "--total-steps", "--rank", "--lr"} <= shown["--help"]
    assert not {"--hysteresis", "--job-token-file", "--zero-stage"} & shown["--help"]
    assert shown["--help"] < shown["--help-all"]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.fullmatch(r"dist_clm_train \d+\.\d+\.\d+\n", printed_by("--version", capsys))


def printed_by(flag: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        train_parser().parse_args([flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


def test_every_flag_is_a_field_of_one_group() -> None:
    """Each flag sets a field of exactly one group of settings; three fields have no flag."""
    groups = get_type_hints(settings.Settings).values()
    names = [field.name for group in groups for field in fields(group)]
    assert len(names) == len(set(names))
    assert set(names) - {flag.dest for flag in FLAGS} == {"sources", "start_id", "agent_store"}
    assert {flag.dest for flag in FLAGS} <= set(names)


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ValueError) as caught:
        check_disk(SingleProcessCommunicator(), tmp_path / "not" / "there", needed=2 * 10**6)
    words = ("--checkpoint-path", str(tmp_path / "not" / "there"), "2.0 MB", "1.0 MB")
    assert all(word in str(caught.value) for word in words)
    check_disk(SingleProcessCommunicator(), tmp_path, needed=10**5)
