"""Small training runs of the checks: every rank is a process that runs dist_clm_train.py.

On a CPU a rank is a fork. On a GPU it is a new Python interpreter; all ranks share GPU 0. Every run
has a deadline; a rank that still runs then has printed the stacks of its threads, and is killed.
"""

import faulthandler
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monitor.metrics import read_metrics
from tests.gpu.report import CheckReport, Options
from tests.support.flags import flags_of
from tests.support.hooks import no_picture
from tests.support.launcher import Process, fork, free_port, preload, use_new_interpreters
from tests.support.runs import Attendant, Hook, Outcome, Rank, Run, run_all

# NCCL refuses two ranks on one GPU if they have the same host. With a host name of its own, a rank
# seems to be on another machine, and NCCL connects the ranks through sockets.
NCCL_APART = {
    "NCCL_NET": "Socket",
    "NCCL_IB_DISABLE": "1",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_MAX_NCHANNELS": "2",
    "NCCL_MAX_P2P_NCHANNELS": "2",
    "NCCL_DEBUG": "WARN",
}
ROWS, SEQ_LENGTH, STEPS = 4, 64, 4  # ROWS: sequences of all replicas in a step
MODEL = {
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": SEQ_LENGTH,
    "hidden_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ModelConfig = tuple[str, Mapping[str, Any]]  # family, and the fields of its config
_STACKS_EVERY = 8.0  # seconds; less than --dist-timeout, so a rank that hangs prints its stacks
_TAIL = 60  # lines of each rank that are shown after a failure
_SPARE = 8.0  # seconds before a check's limit at which all its runs have ended


class Clock:
    """The seconds that are left to a check."""

    def __init__(self, options: Options) -> None:
        self._end = time.monotonic() + options.limit - _SPARE

    def share(self, runs: int) -> float:
        """Returns the deadline in seconds of the next run, if `runs` runs are left.

        The last run gets all the time that is left, and an earlier run half of it: a run that hangs
        leaves time to the others, and a run on a busy machine gets more than an equal share.
        """
        left = max(5.0, self._end - time.monotonic())
        return left if runs <= 1 else left / 2


@dataclass(frozen=True)
class World:
    """A run: its name, stages (P), replicas (R), flags, and the backend of its messages.

    disk: the folder of its checkpoints, so that a run can resume another one; default: the name.
    attend: is called repeatedly while the run lasts (tests.support.runs).
    hooks: changes to its ranks.
    environ: additional environment variables of its ranks.
    """

    name: str
    stages: int = 1
    replicas: int = 1
    flags: str = ""
    backend: str = "gloo"
    disk: str = ""
    attend: Attendant | None = None
    hooks: Sequence[Hook] = ()
    environ: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stacks:
    """A rank that prints the stacks of its threads again and again, in case that it hangs."""

    rank: int

    def arm(self) -> None:
        faulthandler.dump_traceback_later(_STACKS_EVERY, repeat=True, file=sys.stderr)


def environ_of(rank: int, options: Options) -> Mapping[str, str]:
    """Returns the environment variables with which two ranks can share a GPU."""
    return {"NCCL_HOSTID": f"r{rank}", **NCCL_APART} if options.is_cuda else {}


def make_inputs(folder: Path, configs: Mapping[str, ModelConfig]) -> None:
    """Writes the config and the tokenizer of every model, by name, and a file of texts."""
    from transformers import GPTJConfig, GPTNeoXConfig  # slow; it runs in a process of its own

    from tests.support.data import make_texts, tokenizer, write_jsonl

    classes = {"gptj": GPTJConfig, "gptneox": GPTNeoXConfig}
    for name, (family, config) in configs.items():
        classes[family](**config).save_pretrained(folder / name)
        tokenizer().save_pretrained(folder / name)
    write_jsonl(folder / "a.jsonl", make_texts(300, seed=1))


def start_inputs(
    folder: Path,
    options: Options,
    configs: Mapping[str, ModelConfig] | None = None,
    *,
    imports: Sequence[str] = (),
) -> Process:
    """Starts a process that calls `make_inputs`; call `finish` before the inputs are used.

    `imports` are modules that most ranks of the check import, beside those of a training run.
    """
    preload("tests.support.preloaded_training", *imports)
    if options.is_cuda:
        use_new_interpreters()
    return fork(folder / "inputs", make_inputs, folder, configs or {"model": ("gptneox", MODEL)})


def finish(process: Process, *, within: float) -> None:
    """Waits for a process; raises RuntimeError with its last line if it fails or does not end."""
    status = process.status(within=within)
    process.kill()
    if status != 0:
        raise RuntimeError(f"ended with status {status}: {(process.lines or ['no output'])[-1]}")


def run_worlds(
    chains: Sequence[Sequence[World]],
    folder: Path,
    options: Options,
    clock: Clock,
    *,
    later: int = 0,
) -> dict[str, Outcome]:
    """Runs chains of worlds; prints what failed runs wrote. Returns the outcomes by name.

    On a GPU all chains run at once, on a CPU one world after another. `later` is the number of such
    calls that follow and need time too.
    """
    outcomes: dict[str, Outcome] = {}
    if options.is_cuda:
        seconds = clock.share(1 + later)
        runs = [
            [_run(world, folder, options, seconds / len(chain)) for world in chain]
            for chain in chains
        ]
        outcomes |= run_all(runs, at_once=len(runs))
    else:
        worlds = [world for chain in chains for world in chain]
        for number, world in enumerate(worlds):
            seconds = clock.share(len(worlds) - number + later)
            outcomes |= run_all([[_run(world, folder, options, seconds)]], at_once=1)
    for world in (world for chain in chains for world in chain):
        is_killed = world.attend is not None
        if not is_killed and not succeeded(outcomes[world.name]):
            _show(world.name, outcomes[world.name])
    return outcomes


def _run(world: World, folder: Path, options: Options, seconds: float) -> Run:
    size, url = world.stages * world.replicas, f"tcp://127.0.0.1:{free_port()}"
    place = folder / world.name
    place.mkdir()
    cuda = "true --cuda-id 0" if options.is_cuda else "false"
    timeout = 20 if options.is_cuda else 60  # a busy CPU can be slow
    dp_backend = "gloo" if world.backend == "gloo" else "nccl"
    common = flags_of(f"""
        --model-name {folder}/model --load-pretrained-model false --model-type gptneox
        --num-layers auto --embedding-dim {MODEL["hidden_size"]} --task-name {folder}/a.jsonl
        --seq-length {SEQ_LENGTH} --batch-size {ROWS // world.replicas} --micro-batch-size 1
        --total-steps {STEPS} --lr 1e-3 --recompute false --data-workers 0 --net-interface lo
        --pipeline-group-size {world.stages} --data-group-size {world.replicas}
        --world-size {size} --dist-url {url} --join-timeout 60 --dist-timeout {timeout}
        --checkpoint-path {disk(folder, world)} --use-cuda {cuda}
        --dist-backend {world.backend} --dp-backend {dp_backend}
    """)
    flags = {**common, **flags_of(world.flags)}
    ranks = [
        Rank(
            to_argv({**flags, "rank": rank}),
            place,
            environ={**environ_of(rank, options), **world.environ},
            hooks=[
                Stacks(rank),
                *(hook for hook in (no_picture, *world.hooks) if hook.rank == rank),
            ],
        )
        for rank in range(size)
    ]
    return Run(world.name, ranks, world.attend, seconds)


def to_argv(flags: Mapping[str, Any]) -> list[str]:
    return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]


def disk(folder: Path, world: World) -> Path:
    """Returns the folder of a run's checkpoints and metrics."""
    return folder / world.name / "disk" if not world.disk else folder / world.disk / "disk"


def metric(folder: Path, world: World, key: str = "loss") -> list[float]:
    """Returns the values of `key`, one per step; empty if the run wrote no metrics."""
    path = disk(folder, world) / "metrics.jsonl"
    return [line[key] for line in read_metrics(path)] if path.exists() else []


def largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the largest relative difference; infinite if a value is missing or not finite."""
    if not expected or len(found) != len(expected) or not all(map(math.isfinite, expected)):
        return math.inf
    apart = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    return max(apart) if all(map(math.isfinite, apart)) else math.inf


@contextmanager
def expecting(report: CheckReport, name: str) -> Iterator[None]:
    """Adds a row that holds if the `with` block raises no exception; its note is the error."""
    try:
        yield
    except Exception as error:
        print(error)
        report.expect(name, False, note=_telling_line(str(error).splitlines()))
    else:
        report.expect(name, True)


def expect_losses(
    report: CheckReport,
    name: str,
    outcome: Outcome,
    found: Sequence[float],
    expected: Sequence[float],
    *,
    tolerance: float,
    note: str = "",
) -> None:
    """Adds the row of a run: it ends, and its losses differ by at most `tolerance`, relatively.

    Losses that are equal in all steps would hide an update that does nothing, so they must differ.
    """
    if not succeeded(outcome):
        report.expect(name, False, note=reason(outcome))
        return
    apart = largest_difference(found, expected)
    moves = len(set(found)) == len(found) > 1
    if not moves:
        note = f"losses that do not change: {found}"
    report.expect(name, moves and apart <= tolerance, apart, "relative", note)


def succeeded(outcome: Outcome) -> bool:
    """Returns whether all ranks ended with status 0; the status of a rank that hung is None."""
    return all(status == 0 for status in outcome.statuses)


def reason(outcome: Outcome) -> str:
    """Returns why a run failed: NCCL's first warning, else the last line of the first rank."""
    hung = [str(rank) for rank, status in enumerate(outcome.statuses) if status is None]
    if hung:
        return f"hung: rank {', '.join(hung)}; the stacks are above"
    first = next(ended for ended in outcome if ended.status)
    lines = [line for ended in outcome for line in (*ended.stdout.splitlines(), *ended.lines)]
    return _telling_line([*lines, *first.lines[-1:]]) or f"exit status {first.status}"


def _telling_line(lines: Sequence[str]) -> str:
    """Returns NCCL's first warning among `lines`, else the last line; empty without lines."""
    warnings = [line for line in lines if "NCCL WARN" in line]
    return [*warnings, *lines[-1:], ""][0][:300]


def _show(name: str, outcome: Outcome) -> None:
    for rank, ended in enumerate(outcome):
        print(f"--- {name}, rank {rank}: exit status {ended.status}")
        for text in (ended.stdout, ended.stderr):
            print("\n".join(text.splitlines()[-_TAIL:]))
