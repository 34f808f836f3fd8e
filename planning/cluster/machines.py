"""Facts about each rank's machine for --check-cluster, and the differences between ranks."""

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
from common.files import read_json_object
from modules.matmul.cpu_info import CpuInfo
from modules.model_sizes import ModelSizes
from modules.registry import MODELS
from pipeline_parallel.partition.balance import choose_split
from pipeline_parallel.partition.split import stage_modules

_ROOT = Path(__file__).parents[2]
_NOT_SOURCES = {"tests", "benchmarks", "example_scripts", "docs"}
_SHOWN = 60  # characters of a value in a message


class MachineFacts(NamedTuple):
    """The facts about one rank, which the ranks exchange as JSON.

    Attributes:
        model: the sizes of the model; None if the rank cannot read a config.json that fits the
            flags.
        problems: a line for each mistake of the user that would end a run.
        versions: the versions of software, by name.
        config: the values of config.json, by key.
        files: the size of each layer shard of the rank's stage, and the checksum if a manifest has
            one; None for a missing file.
        damage: a line for each reason to reject a shard that exists.
        resumes: whether a run would read its weights from a checkpoint in --checkpoint-path, not
            from the shards.
    """

    device: str
    model: ModelSizes | None
    problems: list[str]
    versions: dict[str, str]
    config: dict[str, str]
    files: dict[str, str | None]
    damage: list[str]
    resumes: bool

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> "MachineFacts":
        """Returns the facts of a rank from their JSON."""
        facts = cls(*values)
        return facts._replace(model=None if facts.model is None else ModelSizes(*facts.model))


def collect_machine_facts(
    settings: Settings, topology: Topology, device: torch.device
) -> MachineFacts:
    """Collects the facts about this rank, without reading weights."""
    problems, model, files = [], None, {}
    folder, checkpoint = settings.model.model_name, settings.checkpoint
    for check in (check_model, check_optimizer):
        try:
            check(settings)
        except ValueError as error:
            problems.append(str(error))
    try:
        family = MODELS[settings.model.model_type].load()
        model = family.sizes(family.load_config(folder))
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
        {key: _short(value) for key, value in _read_json(folder / "config.json").items()},
        files,
        _damage(folder, [name for name, identity in files.items() if identity is not None]),
        checkpoint.load_checkpoint and (checkpoint.checkpoint_path / "latest").exists(),
    )


def describe_device(device: torch.device) -> str:
    """Returns the name of the GPU, or the name of the CPU and the number of torch's threads."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda:{device.index})"
    threads = torch.get_num_threads()
    return f"{CpuInfo.of_this_machine().name}, {threads} thread{'s' if threads > 1 else ''}"


def versions(settings: Settings, device: torch.device) -> dict[str, str]:
    """Returns the versions of the software that affects the results."""
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
    return {**found, "this program": _digest_sources()}


def differences(participants: Sequence[Participant], machines: Sequence[MachineFacts]) -> list[str]:
    """Returns lines that name the ranks with differences, missing files or other problems."""
    present = [
        {name: identity for name, identity in machine.files.items() if identity is not None}
        for machine in machines
    ]
    lines = [
        *_differing("", participants, [machine.versions for machine in machines]),
        *_differing("config.json: ", participants, [machine.config for machine in machines]),
        *_differing("", participants, present),
    ]
    ranks = [(_name(p), machine) for p, machine in zip(participants, machines, strict=True)]
    if not any(machine.resumes for machine in machines):
        for rank, machine in ranks:
            missing = [name for name, identity in machine.files.items() if identity is None]
            if missing:
                lines.append(f"{rank} has no {', '.join(missing)} in --model-name")
            lines += [f"{rank}: {problem}" for problem in machine.damage]
    return lines + [f"{rank}: {problem}" for rank, machine in ranks for problem in machine.problems]


def _shards(settings: Settings, topology: Topology, model: ModelSizes) -> dict[str, str | None]:
    """Returns the size and checksum of each file that this rank's stage reads, by file name."""
    if not settings.model.load_pretrained_model:
        return {}
    work, num_stages = model.work(settings.update.seq_length), topology.num_stages
    split = choose_split(
        settings.model.num_layers, work, num_stages=num_stages, model_layers=model.layers
    )
    folder = settings.model.model_name
    sums = _read_json(folder / "manifest.json").get("files")
    if not isinstance(sums, dict):
        sums = {}
    names = [shard_name(index, model.layers) for index in stage_modules(topology.stage, split)]
    return {name: _identity(folder / name, sums.get(name)) for name in names}


def _identity(path: Path, listed: Any) -> str | None:
    if not path.exists():
        return None
    return f"{path.stat().st_size:,} bytes" + ("" if listed is None else f" ({_short(listed)})")


def _damage(folder: Path, names: Sequence[str]) -> list[str]:
    """Returns the errors of the shards' size checks; an error of several shards is listed once."""
    lines = []
    for name in names:
        try:
            check_shard_size(folder / name)
        except ValueError as error:
            lines.append(str(error))
    return list(dict.fromkeys(lines))


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or {} if the file is missing or invalid."""
    try:
        return read_json_object(path)
    except ValueError:
        return {}


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    if len(text) <= _SHOWN:
        return text
    return f"{text[: _SHOWN // 2]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def _digest_sources() -> str:
    """Returns a digest of the program's source files."""
    digest = hashlib.sha256()
    packages = [init.parent for init in _ROOT.glob("*/__init__.py")]
    modules = [
        path
        for package in packages
        if package.name not in _NOT_SOURCES
        for path in package.rglob("*.py")
    ]
    for path in sorted([*_ROOT.glob("*.py"), *modules]):
        digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes())
    return f"sha256 {digest.hexdigest()[:12]}"


def _differing(
    prefix: str, participants: Sequence[Participant], facts: Sequence[Mapping[str, str]]
) -> list[str]:
    """Returns a line for each fact whose value differs between the ranks that have it.

    With a `prefix` (for config.json), a rank without the fact also differs, unless it has no facts.
    """
    lines = []
    for name in dict.fromkeys(name for of_rank in facts for name in of_rank):
        values = [
            (participant, of_rank.get(name, "not there"))
            for participant, of_rank in zip(participants, facts, strict=True)
            if name in of_rank or (prefix and of_rank)
        ]
        counts = Counter(value for _, value in values)
        if len(counts) > 1:
            lines.append(f"{prefix}{name} is {_spread(values, counts.most_common(1)[0][0])}")
    return lines


def _spread(values: Sequence[tuple[Participant, str]], usual: str) -> str:
    """Returns the values with their ranks as text; `usual` is the most frequent value."""
    ranks: dict[str, list[str]] = {}
    for participant, value in values:
        ranks.setdefault(value, []).append(_name(participant))
    others = ranks.pop(usual)
    unusual = ", ".join(f"{value} on {', '.join(names)}" for value, names in ranks.items())
    return f"{unusual}, but {usual} on {others[0] if len(others) == 1 else 'the others'}"


def _name(participant: Participant) -> str:
    return f"rank {participant.rank} (host {participant.host})"
