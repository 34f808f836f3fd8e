"""What each rank of --check-cluster tells of its machine, and in what the ranks differ."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from arguments.config_checks import check_model, check_optimizer
from arguments.settings import Settings
from checkpoint.files.layer_shards import check_shard_size, shard_name
from comm.rendezvous.participants import Participant
from comm.topology import Topology
from modules.matmul.cpu_info import CpuInfo
from modules.model_sizes import ModelSizes
from modules.registry import MODELS
from pipeline_parallel.partition.balance import choose_split
from pipeline_parallel.partition.split import Split, stage_modules

_ROOT = Path(__file__).parents[2]
_NOT_SOURCES = {"tests", "benchmarks", "example_scripts", "docs"}
_SHOWN = 60  # characters of a value in a message


class MachineFacts(NamedTuple):
    """One rank's, as it travels in JSON.

    model: None where the rank cannot read a config.json that fits with the flags.
    problems: what would end a run, in a line each.
    versions: by name. config: by key. files: of its stage's shards, by name, their size and, where
    a manifest tells it, their checksum; None where there is no such file. damage: why a run would
    not take those that are there, in a line each.
    resumes: its --checkpoint-path has a checkpoint, so that shards are not read.
    """

    device: str
    model: ModelSizes | None
    problems: list[str]
    versions: dict[str, str]
    config: dict[str, str]
    files: dict[str, str | None]
    damage: list[str]
    resumes: bool


def collect_machine_facts(
    settings: Settings, topology: Topology, device: torch.device
) -> MachineFacts:
    """This rank's, without reading a weight."""
    problems, model, files = [], None, {}
    for check in (check_model, check_optimizer):
        try:
            check(settings)
        except ValueError as error:
            problems.append(str(error))
    try:
        family = MODELS[settings.model.model_type].load()
        model = family.sizes(family.load_config(settings.model.model_name))
        if not problems:
            files = _shards(settings, topology, model)
    except (ValueError, OSError) as error:
        if not problems:
            problems.append(str(error))
    return MachineFacts(
        describe_device(device),
        model,
        problems,
        versions(settings, device),
        _config(settings.model.model_name / "config.json"),
        files,
        _damage(
            settings.model.model_name, [name for name, found in files.items() if found is not None]
        ),
        settings.checkpoint.load_checkpoint
        and (settings.checkpoint.checkpoint_path / "latest").exists(),
    )


def from_json(found: Sequence[Any]) -> MachineFacts:
    """A Machine as the others get it."""
    machine = MachineFacts(*found)
    return machine._replace(model=None if machine.model is None else ModelSizes(*machine.model))


def describe_device(device: torch.device) -> str:
    """The GPU, or the processor and how many of its threads this rank computes in."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index})"
    threads = torch.get_num_threads()
    return f"{CpuInfo.of_this_machine().name}, {threads} thread{'s' if threads > 1 else ''}"


def versions(settings: Settings, device: torch.device) -> dict[str, str]:
    """Of what the ranks compute and talk with."""
    found = {"Python": platform.python_version(), "torch": torch.__version__}
    packages = ["transformers"]
    if settings.update.optimizer == "8bit-adam":
        packages.append("bitsandbytes")
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["this program"] = _sources()
    return found


def differences(participants: Sequence[Participant], machines: Sequence[MachineFacts]) -> list[str]:
    """What differs between the ranks or is lacking, in a line each, naming who has what."""
    named = [
        *_differing("", participants, [machine.versions for machine in machines]),
        *_differing("config.json: ", participants, [machine.config for machine in machines]),
        *_differing("", participants, [_present(machine.files) for machine in machines]),
    ]
    if not any(machine.resumes for machine in machines):
        for participant, machine in zip(participants, machines, strict=True):
            missing = [name for name, found in machine.files.items() if found is None]
            if missing:
                named.append(f"{_who(participant)} has no {', '.join(missing)} in --model-name")
            named += [f"{_who(participant)}: {problem}" for problem in machine.damage]
    for participant, machine in zip(participants, machines, strict=True):
        named += [f"{_who(participant)}: {problem}" for problem in machine.problems]
    return named


def _shards(settings: Settings, topology: Topology, model: ModelSizes) -> dict[str, str | None]:
    """Of the files that this rank's stage reads."""
    if not settings.model.load_pretrained_model:
        return {}
    split: Split = choose_split(
        settings.model.num_layers,
        model.work(settings.update.seq_length),
        num_stages=topology.num_stages,
        model_layers=model.layers,
    )
    sums = _manifest(settings.model.model_name / "manifest.json")
    names = [shard_name(index, model.layers) for index in stage_modules(topology.stage, split)]
    return {name: _identity(settings.model.model_name / name, sums.get(name)) for name in names}


def _identity(path: Path, listed: Any) -> str | None:
    if not path.exists():
        return None
    return f"{path.stat().st_size:,} bytes" + ("" if listed is None else f" ({_short(listed)})")


def _damage(folder: Path, names: Sequence[str]) -> list[str]:
    """What the manifest shows of these shards without reading them; each line once."""
    found = []
    for name in names:
        try:
            check_shard_size(folder / name)
        except ValueError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _manifest(path: Path) -> Mapping[str, Any]:
    try:
        files = json.loads(path.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def _config(path: Path) -> dict[str, str]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    return {key: _short(value) for key, value in config.items()}


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    if len(text) <= _SHOWN:
        return text
    return f"{text[: _SHOWN // 2]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _sources() -> str:
    """A digest of the program's own files."""
    digest = hashlib.sha256()
    packages = [init.parent for init in _ROOT.glob("*/__init__.py")]
    modules = [
        path for one in packages if one.name not in _NOT_SOURCES for path in one.rglob("*.py")
    ]
    for path in sorted([*_ROOT.glob("*.py"), *modules]):
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:12]}"


def _present(files: Mapping[str, str | None]) -> dict[str, str]:
    return {name: found for name, found in files.items() if found is not None}


def _differing(
    prefix: str, participants: Sequence[Participant], found: Sequence[Mapping[str, str]]
) -> list[str]:
    """What does not have one value on all ranks that have it (of config.json: on all)."""
    lines = []
    for name in dict.fromkeys(name for one in found for name in one):
        having = [
            (participant, one.get(name, "not there"))
            for participant, one in zip(participants, found, strict=True)
            if name in one or (prefix and one)
        ]
        values = Counter(value for _, value in having)
        if len(values) > 1:
            lines.append(f"{prefix}{name} is {_spread(having, values.most_common(1)[0][0])}")
    return lines


def _spread(having: Sequence[tuple[Participant, str]], usual: str) -> str:
    """Who has which value; the most frequent one is that of all others."""
    told = [
        f"{value} on {', '.join(_who(a) for a, v in having if v == value)}"
        for value in dict.fromkeys(value for _, value in having)
        if value != usual
    ]
    others = [participant for participant, value in having if value == usual]
    return f"{', '.join(told)}, but {usual} on " + (
        _who(others[0]) if len(others) == 1 else "the others"
    )


def _who(participant: Participant) -> str:
    return f"rank {participant.rank} (host {participant.host})"
