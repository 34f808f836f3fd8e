"""Training runs inside processes that a test has spawned: many runs for one spawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from arguments import parse_train
from comm.fabric import connect
from comm.interface import Interface
from comm.rendezvous import Rendezvous, join
from comm.topology import Topology
from comm.watch import Watch
from monitor.console import Console
from monitor.metrics import read_metrics
from training_setup import train


def train_cases(
    rank: int,
    world_size: int,
    _url: str,
    shapes: Sequence[tuple[int, int, str]],
    cases: Sequence[tuple[str, dict[str, Any]]],
    folder: Path,
) -> None:
    """For every shape (P, R, url) of this world, trains every case (name, flags without dashes).

    The ranks meet at each shape's url; flags may be functions of (P, R). Checkpoints go to
    `folder`/<name>-<P>-<R>.
    """
    torch.set_num_threads(1)
    for stages, replicas, shape_url in shapes:
        topology = Topology(rank, stages, replicas)
        rendezvous = _meet(rank, world_size, shape_url)
        watch = Watch.connect(rendezvous, topology)
        fabric = connect(
            topology,
            rendezvous,
            dist_backend="gloo",
            dp_backend="gloo",
            device=torch.device("cpu"),
            dist_timeout=60.0,
            watch=watch,
        )
        for name, flags in cases:
            own = {
                "checkpoint-path": run_folder(folder, name, stages, replicas),
                "pipeline-group-size": stages,
                "data-group-size": replicas,
                "world-size": world_size,
                "rank": rank,
            }
            args = parse_train(to_argv({**_at(flags, stages, replicas), **own}), {})
            args.checkpoint_path.mkdir(parents=True, exist_ok=True)
            train(
                args,
                topology=topology,
                fabric=fabric,
                device=torch.device("cpu"),
                nonce=rendezvous.nonce,
                console=Console(io.StringIO()),
            )
        fabric.close()
        watch.close()


def run_folder(folder: Path, name: str, stages: int, replicas: int) -> Path:
    return folder / f"{name}-{stages}-{replicas}"


def curve(folder: Path, name: str, stages: int, replicas: int, key: str = "loss") -> list[float]:
    """One key of a run's metrics, over its iterations."""
    lines = read_metrics(run_folder(folder, name, stages, replicas) / "metrics.jsonl")
    return [line[key] for line in lines]


def to_argv(flags: dict[str, Any]) -> list[str]:
    return [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]


def _at(flags: dict[str, Any], stages: int, replicas: int) -> dict[str, Any]:
    return {k: v(stages, replicas) if callable(v) else v for k, v in flags.items()}


def _meet(rank: int, world_size: int, url: str) -> Rendezvous:
    if world_size == 1:
        return Rendezvous.alone()
    return join(
        url=url,
        rank=rank,
        world_size=world_size,
        interface=Interface("lo", "127.0.0.1"),
        facts={},
        prefix="test",
        join_timeout=60.0,
    )
