"""Tests how launchers (example scripts, sbatch, torchrun) start ranks and pass signals to them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arguments.train import train_parser
from monitor.metrics import read_metrics
from tests.support.cases import to_argv
from tests.support.flags import flags_of
from tests.support.kill_lab import Lab, Start, make_lab, marked, numbers, same, state
from tests.support.launcher import run_ranks

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "example_scripts"
STEPS, SAVE, DEADLINE = 40, 5, 90.0
# Two stages and one replica, with the global batch of make_lab's two replicas.
TWO_RANKS = flags_of(
    f"--world-size 2 --data-group-size 1 --batch-size 4 --total-steps {STEPS} "
    f"--checkpoint-steps {SAVE} --evaluation-steps 0"
)
# Doubles of Slurm's commands for finetune_gptneox.sbatch: srun's one task ends with $STATUS, or
# with 75 after a signal; the job is in state $STATE.
SLURM = {
    "srun": """\
trap "exit 75" TERM
touch "$LOG.began"
for _ in $(seq 300); do [ -n "$STATUS" ] && exit "$STATUS"; sleep 0.1; done""",
    "squeue": 'echo "$STATE"',
    "scontrol": '[ "$1" = show ] && echo node1 || echo "$*" >>"$LOG"',
}
# A rank that exits with 75 after a signal to stop.
LISTENING = """
import sys, time
from comm.lifecycle.stop_signals import STOPPED, StopListener, StopRequest
rank = int(sys.argv[sys.argv.index("--rank") + 1])
request = StopRequest()
StopListener(request, rank=rank, alone=False)
sys.stdout.write("listens\\n")
sys.stdout.flush()
while request.asked is None:
    time.sleep(0.01)
sys.stdout.write(f"rank {rank}: {request.asked}\\n")  # one write: print needs two under -u
sys.exit(STOPPED)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return make_lab(tmp_path_factory.mktemp("launchers"))


def environ(**more: str) -> dict[str, str]:
    """Returns an environment whose PATH begins with this interpreter's folder, as in a venv."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


@contextmanager
def started(
    command: list[Any], log: Path, env: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process in its own session; kills it and its children when the `with` block ends."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            list(map(str, command)),
            env=env,
            cwd=log.parent,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        for pid in [process.pid, *children(process.pid)]:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """Returns the ids of the process's children."""
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return list(map(int, listed.read_text().split())) if listed.exists() else []


def await_true(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def steps_done(disk: Path) -> int:
    path = disk / "metrics.jsonl"
    return read_metrics(path)[-1]["step"] if path.exists() and path.stat().st_size else 0


def test_a_launch_script_passes_the_signal_on_and_returns_75(tmp_path: Path) -> None:
    """After Ctrl-C (SIGINT), a script sends SIGTERM to its ranks.

    The ranks are background jobs, which ignore SIGINT. A test double of the command `python` starts
    ranks that only wait for a signal.
    """
    log, script = tmp_path / "log", tmp_path / "listen.py"
    script.write_text(LISTENING)
    double = f'#!/usr/bin/env bash\nPYTHONPATH="{ROOT}" exec "{sys.executable}" "{script}" "$@"\n'
    (tmp_path / "python").write_text(double)
    (tmp_path / "python").chmod(0o755)
    env = environ()
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    with started(["bash", SCRIPTS / "finetune_gptj.sh"], log, env) as running:
        await_true(lambda: log.read_text().count("listens") == 2, log)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(DEADLINE) == 75
    told = [line for line in log.read_text().splitlines() if line.startswith("rank ")]
    assert sorted(told) == [
        f"rank {rank}: asked to stop (SIGTERM on rank {rank})" for rank in (0, 1)
    ]


@pytest.mark.parametrize(("script", "ranks"), [("finetune_gptj.sh", 2), ("finetune_gptneox.sh", 8)])
@pytest.mark.parametrize(("launcher", "command"), [("shell", "python"), ("torchrun", "torchrun")])
def test_the_scripts_start_every_rank_with_either_launcher(
    tmp_path: Path, script: str, ranks: int, launcher: str, command: str
) -> None:
    """A script starts all its ranks, and arguments given to the script override its own."""
    log = tmp_path / "log"
    log.touch()
    (tmp_path / command).write_text('#!/usr/bin/env bash\necho "$*" >>"$LOG"\n')
    (tmp_path / command).chmod(0o755)
    env = environ(LAUNCHER=launcher, LOG=str(log))
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    subprocess.run(["bash", SCRIPTS / script, "--total-steps", "10"], env=env, check=True)
    before, own = zip(
        *(line.split("dist_clm_train.py ") for line in log.read_text().splitlines()), strict=True
    )
    args = [train_parser().parse_args(line.split()) for line in own]
    assert all((a.pipeline_group_size, a.total_steps, a.fp16) == (ranks, 10, True) for a in args)
    if launcher == "shell":
        assert sorted((a.rank, a.cuda_id, a.world_size) for a in args) == [
            (rank, rank, ranks) for rank in range(ranks)
        ]
    else:
        assert before == (f"--nproc-per-node {ranks} --shutdown-timeout 300 ",)
        assert [(a.rank, a.cuda_id, a.world_size, a.dist_url) for a in args] == [(None,) * 4]


def test_a_script_refuses_another_launcher() -> None:
    script = SCRIPTS / "finetune_gptj.sh"
    done = subprocess.run(["bash", script], env=environ(LAUNCHER="mpi"), capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"LAUNCHER is mpi; set it to shell or torchrun\n")


@pytest.mark.parametrize(
    ("status", "state_of_job", "expected", "requeued"),
    [
        ("", "RUNNING", 75, True),
        ("", "COMPLETING", 75, False),
        ("1", "RUNNING", 1, False),
        ("0", "RUNNING", 0, False),
    ],
)
def test_the_sbatch_script_requeues_what_stopped_as_asked(
    tmp_path: Path, status: str, state_of_job: str, expected: int, requeued: bool
) -> None:
    """A job that ends with status 75 is requeued, unless it was cancelled (state COMPLETING)."""
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    scripts = tmp_path / "example_scripts"
    shutil.copytree(SCRIPTS, scripts)
    log = tmp_path / "scontrol.log"
    of_test = {"STATUS": status, "STATE": state_of_job, "LOG": str(log)}
    slurm = {"SUBMIT_DIR": str(tmp_path), "JOB_ID": "17", "JOB_NODELIST": "node1", "NTASKS": "8"}
    env = environ(**of_test, **{f"SLURM_{name}": value for name, value in slurm.items()})
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    command = ["bash", scripts / "finetune_gptneox.sbatch"]
    with started(command, tmp_path / "log", env) as job:
        if not status:
            await_true(Path(f"{log}.began").exists, tmp_path / "log")
            job.send_signal(signal.SIGTERM)
        assert job.wait(DEADLINE) == expected
    assert (log.read_text() if log.exists() else "") == ("requeue 17\n" if requeued else "")


def finish(_rank: int, _world: int, _url: str, lab: Lab) -> list[Start]:
    return [lab.start(name, changes=TWO_RANKS) for name in ("torchrun", "whole")]


def test_torchrun_restarts_and_stops_to_the_same_bits(lab: Lab) -> None:
    """torchrun restarts all ranks after one is killed; after SIGTERM, they save a checkpoint.

    If the run is then resumed, its metrics and last checkpoint are those of an uninterrupted run.
    """
    disk, log = lab.disk("torchrun"), lab.folder / "torchrun.log"
    disk.parent.mkdir()
    given = {k: v for k, v in lab.flags.items() if k != "world-size"}
    given |= {k: v for k, v in TWO_RANKS.items() if k != "world-size"} | {"checkpoint-path": disk}
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1"
    command = [sys.executable, *launch.split(), ROOT / "dist_clm_train.py", *to_argv(given)]
    with started(command, log, environ()) as agent:
        await_true(lambda: steps_done(disk) >= SAVE + 2, log)
        os.kill(children(agent.pid)[1], signal.SIGKILL)
        await_true(lambda: len(marked(disk)) == 1, log)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(DEADLINE) == 1
    stopped = steps_done(disk)
    assert (disk / "latest").read_text() == str(stopped)
    assert stopped < STEPS
    (starts,) = run_ranks(1, finish, lab, deadline=DEADLINE)
    assert [start.outcome.statuses[:2] for start in starts] == [[0, 0], [0, 0]]
    assert len(marked(disk)) == 2
    assert numbers(disk) == numbers(lab.disk("whole"))
    for stage in range(2):
        assert same(state(disk, stage, STEPS), state(lab.disk("whole"), stage, STEPS))
