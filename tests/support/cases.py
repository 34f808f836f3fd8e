"""Functions that train many runs in the same processes, and read their metrics and weights."""

import io
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from arguments.settings import Settings
from arguments.train import parse_train
from checkpoint.steps.latest import write_latest
from checkpoint.store import SaveFailedError
from comm.lifecycle.stop_signals import StopRequest
from comm.objects import gather_json
from comm.process_groups import ProcessGroups
from comm.run_context import RunContext
from comm.topology import Topology
from monitor.console import Console
from monitor.metrics import read_metrics
from tests.support.connected import enter
from tests.support.flags import flags_of
from tests.support.launcher import free_port
from training.iteration import TrainingStoppedError
from training.run import train


class Case(NamedTuple):
    """A run to train in one or more shapes.

    flags: flags without dashes; a flag's value can be a function of (P, R).
    hook: returns the context manager in which a process trains, for example to cause a failure.
    after: the folder name of another run, and a step; the run resumes from a copy of this step.
    stops: whether a TrainingStoppedError or a SaveFailedError may end the run.
    shapes: the only shapes (P, R) of the run; None: all shapes.
    """

    name: str
    flags: dict[str, Any]
    hook: Callable[[Topology], AbstractContextManager[object]] | None = None
    after: tuple[str, int] | None = None
    stops: bool = False
    shapes: Collection[tuple[int, int]] | None = None


class Told(NamedTuple):
    """A process's log of a run, and the text of the error that stopped the run (None: no error)."""

    lines: list[str]
    stopped: str | None


def train_cases(
    rank: int,
    world_size: int,
    _url: str,
    shapes: Sequence[tuple[int, int, str]],
    cases: Sequence[Case],
    folder: Path,
    dist_backend: str = "gloo",
    dist_timeout: float = 60.0,
) -> dict[str, Told]:
    """Trains every case in every shape; a case that lists shapes of its own skips all others.

    `shapes` has (P, R, url) for each shape; the ranks meet at this url. Checkpoints are in
    `folder`/<name>-<P>-<R>. Returns what this process logged in each run; the keys are
    <name>-<P>-<R>.
    """
    told: dict[str, Told] = {}
    torch.set_num_threads(1)
    for stages, replicas, shape_url in shapes:
        topology = Topology(rank, stages, replicas)
        meeting = connected(topology, shape_url, dist_backend, dist_timeout=dist_timeout)
        with meeting as (groups, nonce):
            for case in cases:
                if case.shapes is None or (stages, replicas) in case.shapes:
                    path = run_folder(folder, case.name, stages, replicas)
                    told[path.name] = _train_case(case, path, topology, groups, nonce)
    return told


@contextmanager
def connected(
    topology: Topology, url: str, dist_backend: str = "gloo", *, dist_timeout: float = 60.0
) -> Iterator[tuple[ProcessGroups, str]]:
    """Connects this process to its peers; yields the process groups and the rendezvous's nonce."""
    entered = enter(
        topology.rank,
        url,
        num_stages=topology.num_stages,
        num_replicas=topology.num_replicas,
        join_timeout=60.0,
        dist_timeout=dist_timeout,
        dist_backend=dist_backend,
    )
    yield entered.groups, entered.rendezvous.nonce
    entered.close()


def _train_case(
    case: Case, path: Path, topology: Topology, groups: ProcessGroups, nonce: str
) -> Told:
    stages, replicas = topology.num_stages, topology.num_replicas
    own = flags_of(f"""
        --checkpoint-path {path} --pipeline-group-size {stages} --data-group-size {replicas}
        --world-size {stages * replicas} --rank {topology.rank}
    """)
    flags = {k: v(stages, replicas) if callable(v) else v for k, v in case.flags.items()}
    settings = settings_of(flags | own)
    if topology.rank == 0 and case.after is not None:
        _copy_run(path.parent / case.after[0], path, step=case.after[1])
    elif topology.rank == 0:
        path.mkdir(parents=True, exist_ok=True)
    gather_json(groups.control, None)  # now the folder exists for all ranks
    hook = nullcontext() if case.hook is None else case.hook(topology)
    listener = LogLines()
    with hook, listener:
        stopped = None
        try:
            train_with(settings, RunContext(topology, groups, torch.device("cpu"), nonce))
        except (TrainingStoppedError, SaveFailedError) as error:
            if not case.stops:
                raise
            stopped = str(error)
    return Told(listener.lines, stopped)


def settings_of(flags: dict[str, Any]) -> Settings:
    """Parses flags; --data-workers is 0 by default: a worker takes longer to start than to work."""
    return parse_train(to_argv({"data-workers": 0, **flags}), {})


def train_with(settings: Settings, context: RunContext) -> None:
    """Trains without drawing the loss curve."""
    with ExitStack() as closing, patch("monitor.recorder.draw_loss"):
        console = Console(io.StringIO())
        train(settings, context, console=console, stop=StopRequest(), closing=closing)


class LogLines(logging.Handler):
    """Log handler that collects messages inside its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "LogLines":
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        root.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def _copy_run(source: Path, target: Path, *, step: int) -> None:
    """Copies a run up to the checkpoint of `step`; the metrics file keeps lines of later steps."""
    shutil.copytree(source, target)
    for entry in target.iterdir():
        if entry.name.isdecimal() and int(entry.name) > step:
            shutil.rmtree(entry)
    write_latest(target, step)


def run_folder(folder: Path, name: str, stages: int, replicas: int) -> Path:
    return folder / f"{name}-{stages}-{replicas}"


def curve(folder: Path, name: str, stages: int, replicas: int, key: str = "loss") -> list[float]:
    """Returns the values of `key` in the run's metrics, one per iteration."""
    lines = read_metrics(run_folder(folder, name, stages, replicas) / "metrics.jsonl")
    return [line[key] for line in lines]


def weights_of(
    folder: Path, name: str, stages: int, replicas: int, step: int | None = None
) -> list[bytes]:
    """Returns the bytes of each weight of a checkpoint (default: the last), layer by layer."""
    path = run_folder(folder, name, stages, replicas)
    saved = path / ((path / "latest").read_text() if step is None else str(step))
    return [
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for stage in range(stages)
        for tensor in torch.load(saved / f"prank_{stage}_checkpoint.pt", weights_only=True).values()
    ]


def to_argv(flags: dict[str, Any]) -> list[str]:
    return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]


def meet_at(shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int, str]]:
    """Returns (P, R, url) for each shape; every url has a different free port."""
    return [(*shape, f"tcp://127.0.0.1:{free_port()}") for shape in shapes]
