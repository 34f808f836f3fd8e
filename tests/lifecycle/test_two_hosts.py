"""Tests a run on two machines that share only the code and are joined by a network.

Each machine is a network namespace with its own address, interface name, host name and folder. The
rank on one machine is killed, and then both ranks are started again. The losses must equal those of
an uninterrupted run on one machine, bit for bit.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from monitor.metrics import read_metrics
from tests.support.cases import to_argv
from tests.support.checkpoint_models import to_hf
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.hooks import kill_once, no_picture
from tests.support.hosts import HOSTS, wired
from tests.support.models import make_shards
from tests.support.runs import Ended, Outcome, Rank, Run, run_all

Outcomes = dict[str, Outcome]  # by run
STEPS, EVERY = 20, 5
LAYOUTS = {"one pipeline": (2, 1), "one replica in each": (1, 2)}  # stages and replicas
LAYERS = 3


@pytest.fixture(scope="module")
def wire() -> Iterator[None]:
    """Creates the two hosts for the duration of the tests."""
    with wired():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with layer shards in m and data in data.jsonl."""
    folder = tmp_path_factory.mktemp("two-hosts")
    make_shards(folder, "m", "gptneox", {"num_hidden_layers": LAYERS}, place="")
    write_jsonl(folder / "data.jsonl", make_texts(60, seed=1))
    return folder


def furnish(base: Path, layout: str) -> None:
    """Gives each host its stage's shards and config; only the first gets data and tokenizer."""
    for index, host in enumerate(HOSTS):
        home = base / layout / host.name
        shutil.copytree(base / "m", home / "m")
        if LAYOUTS[layout][0] == 2:
            others = [["pytorch_2", "pytorch_lm_head"], ["pytorch_embs", "pytorch_0", "pytorch_1"]]
            for name in others[index]:
                (home / "m" / f"{name}.pt").unlink()
    shutil.copy(base / "data.jsonl", base / layout / HOSTS[0].name / "data.jsonl")
    for path in (base / layout / HOSTS[1].name / "m").glob("*token*"):
        path.unlink()


def flags(layout: str, rank: int, port: int) -> dict[str, Any]:
    stages, replicas = LAYOUTS[layout]
    return flags_of(f"""
        --model-name m --model-type gptneox --num-layers {LAYERS - stages + 1} --embedding-dim 32
        --task-name {"data.jsonl" if rank == 0 else "nothing-here.jsonl"} --seq-length 24
        --batch-size {4 // replicas} --total-steps {STEPS} --checkpoint-steps {EVERY}
        --checkpoint-path run --lr 1e-3 --data-workers 0 --recompute false --world-size 2
        --rank {rank} --pipeline-group-size {stages} --data-group-size {replicas}
        --dist-url tcp://{HOSTS[0].address}:{port} --join-timeout 60 --dist-timeout 60
    """)


def chain(base: Path, layout: str, port: int, victim: int) -> list[Run]:
    """Returns three starts of a run: one has a wrong interface, one loses a rank, one resumes."""
    homes = [base / layout / host.name for host in HOSTS]

    def start(name: str, interfaces: tuple[str | None, str | None], kill: bool = False) -> Run:
        ranks = []
        for rank, host in enumerate(HOSTS):
            named = interfaces[rank]
            extra = {} if named is None else {"net-interface": named}
            given = to_argv(flags(layout, rank, port) | extra)
            ranks.append(Rank(given, homes[rank], host=host.name, hooks=[no_picture]))
        saved = homes[0] / "run" / "latest"  # written after both hosts have the step
        attend = kill_once(victim, lambda _pid: saved.exists()) if kill else None
        return Run(f"{layout}, {name}", ranks, attend)

    named = (HOSTS[0].interface, HOSTS[1].interface)
    return [
        start("astray", (HOSTS[0].interface, "lo")),
        start("killed", named, kill=True),
        start("resumed", (None, None)),
    ]


def alone(base: Path, layout: str, port: int) -> Run:
    """Returns an uninterrupted run with the flags of `chain`, but with both ranks on one host."""
    home = base / layout / "alone"
    home.mkdir()
    shutil.copytree(base / "m", home / "m")
    shutil.copy(base / "data.jsonl", home / "data.jsonl")
    argvs = [to_argv(flags(layout, rank, port)) for rank in range(2)]
    ranks = [Rank(argv, home, host=HOSTS[0].name, hooks=[no_picture]) for argv in argvs]
    return Run(f"{layout}, alone", ranks)


def our_lines(ended: Ended) -> list[str]:
    """Returns the lines on stderr except torch's lines about addresses without a host name."""
    return [line for line in ended.lines if "hostname of the client socket cannot be" not in line]


@pytest.fixture(scope="module")
def ended(wire: None, base: Path) -> Outcomes:
    """Executes the runs of the two LAYOUTS, one run after another in each; returns the outcomes."""
    chains = []
    for index, layout in enumerate(LAYOUTS):
        furnish(base, layout)
        port = 7033 + 10 * index
        chains.append([alone(base, layout, port + 1), *chain(base, layout, port, victim=1 - index)])
    return run_all(chains, at_once=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_those_of_one_host(layout: str, base: Path, ended: Outcomes) -> None:
    for name in ("alone", "resumed"):
        for outcome in ended[f"{layout}, {name}"]:
            assert (outcome.status, our_lines(outcome)) == (0, []), outcome
    apart = read_metrics(base / layout / HOSTS[0].name / "run" / "metrics.jsonl")
    together = read_metrics(base / layout / "alone" / "run" / "metrics.jsonl")
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [line[key] for line in apart] == [line[key] for line in together]
    assert len(apart) == STEPS
    (resumed,) = [line["step"] for line in apart if line.get("resumed")]
    assert resumed > EVERY


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_survivor_names_the_rank_and_host_that_died(layout: str, ended: Outcomes) -> None:
    victim = 1 - list(LAYOUTS).index(layout)
    outcomes = ended[f"{layout}, killed"]
    assert outcomes[victim].status == -9
    survivor = outcomes[1 - victim]
    assert survivor.status == 1
    (line,) = our_lines(survivor)
    assert line.startswith(f"rank {1 - victim}: rank {victim} (stage ")
    assert f"host {HOSTS[victim].name})" in line


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interface_that_does_not_reach_the_other_host(layout: str, ended: Outcomes) -> None:
    for outcome in ended[f"{layout}, astray"]:
        assert outcome.status == 2
        (line,) = our_lines(outcome)
        assert f"--net-interface: rank 1 (host {HOSTS[1].name}) uses lo (127.0.0.1)" in line


def test_each_host_keeps_its_own_stage(base: Path, ended: Outcomes) -> None:
    homes = [base / "one pipeline" / host.name for host in HOSTS]
    for stage, home in enumerate(homes):
        step = home / "run" / str(STEPS)
        parts = sorted(path.name for path in step.glob("prank_*"))
        assert parts == [
            f"prank_{stage}_{part}"
            for part in ("checkpoint.pt", "manifest.json", "optimizer.pt", "scheduler.pt")
        ]
        assert (step / "meta.json").exists()
        assert (step / "config.json").exists()
        assert (home / "run" / "latest").read_text() == str(STEPS)
    assert not (base / "one replica in each" / HOSTS[1].name / "run").exists()


def test_gathered_files_become_one_model(base: Path, tmp_path: Path, ended: Outcomes) -> None:
    """The first host's checkpoint plus the second host's weights and manifest is a whole model."""
    near, far = (base / "one pipeline" / host.name / "run" / str(STEPS) for host in HOSTS)
    shutil.copytree(near, tmp_path / "gathered")
    for name in ("prank_1_checkpoint.pt", "prank_1_manifest.json"):
        shutil.copy(far / name, tmp_path / "gathered")
    places = {
        "apart": tmp_path / "gathered",
        "together": base / "one pipeline" / "alone" / "run",
        "replicas": base / "one replica in each" / "alone" / "run",
    }
    found = [converted(place, tmp_path / name) for name, place in places.items()]
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    assert found[0].keys() == found[1].keys() == found[2].keys()


def converted(checkpoint: Path, target: Path) -> dict[str, torch.Tensor]:
    to_hf(checkpoint, target, verify=True)
    model, report = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state: dict[str, torch.Tensor] = model.state_dict()
    return state
