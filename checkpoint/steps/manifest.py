"""What the manifests of a step's folder say: each stage has one, of all that it wrote there.

All stages of a save write the same meta.json, config and tokenizer, so each manifest holds for a
folder of its own as for one that the stages share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.files import checksums as manifest
from checkpoint.files.checksums import FORMAT, FileSum, check_file, check_size, seal, unseal
from common.files import read_json_object

PARTS = ("checkpoint", "optimizer", "scheduler")


@dataclass(frozen=True)
class StageManifest:
    """What one stage wrote in one save.

    save: the same for all stages of a save, and no two saves share it, but for older checkpoints,
        where it is one for all steps of a start: step and save together tell saves apart.
    files: sums by name, of the stage's own files and of those that every stage writes.
    dropped: files that were there and have been removed to make room.
    """

    step: int
    stage: int
    num_stages: int
    save: str
    files: Mapping[str, FileSum]
    dropped: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return manifest_name(self.stage)

    @property
    def common_files(self) -> list[str]:
        """Those that every stage writes: meta.json, config, tokenizer."""
        return [name for name in self.files if not name.startswith("prank_")]

    def encode(self) -> bytes:
        """The file's content."""
        files = manifest.encode_sums(self.files)
        return seal({**vars(self), "files": files, "format": FORMAT})

    def check_sizes(self, folder: Path) -> None:
        """ValueError names the first file of `folder` that is missing or of another size."""
        for name, expected in self.files.items():
            check_size(folder / name, expected, manifest=self.name)

    def check(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Reads all files, or those `names`; ValueError names the first that is not as written."""
        for name in self.files if names is None else names:
            check_file(folder / name, self.files[name], manifest=self.name)


def part_name(stage: int | str, part: str) -> str:
    """The file of one part of a stage; of "*", a pattern of all."""
    return f"prank_{stage}_{part}.pt"


def manifest_name(stage: int | str) -> str:
    """The file of a stage's manifest; of "*", a pattern of all."""
    return f"prank_{stage}_manifest.json"


def read_manifest(folder: Path, stage: int) -> StageManifest:
    """A stage's manifest in a step's folder; ValueError names it where it is not as written, or of
    another stage."""
    return _open(folder / manifest_name(stage))


def _open(path: Path) -> StageManifest:
    body = unseal(path)
    if manifest_name(body["stage"]) != path.name:
        raise ValueError(f"{path}: of stage {body['stage']}, which its name does not say")
    return StageManifest(
        step=body["step"],
        stage=body["stage"],
        num_stages=body["num_stages"],
        save=body["save"],
        files=manifest.decode_sums(body),
        dropped=body["dropped"],
    )


def num_stages(folder: Path) -> int | None:
    """How many stages saved `folder`, by any of its manifests or by meta.json.

    None where it is of a time without manifests. ValueError names a manifest that is damaged.
    """
    found = any_manifest(folder)
    return _told_stages(folder / "meta.json") if found is None else found.num_stages


def manifest_stages(folder: Path) -> list[int]:
    """The stages that have a manifest in a step's folder."""
    names = (path.name for path in folder.glob(manifest_name("*")))
    found = (re.fullmatch(manifest_name("([0-9]+)"), name) for name in names)
    return sorted(int(one[1]) for one in found if one)


def any_manifest(folder: Path) -> StageManifest | None:
    """The first of those in a step's folder; ValueError names it where it is damaged."""
    found = sorted(folder.glob(manifest_name("*")))
    return _open(found[0]) if found else None


def check_one_save(folder: Path, manifests: Sequence[StageManifest]) -> None:
    """ValueError names the first of a folder's manifests that is not of the step and the save of
    the first."""
    first = manifests[0]
    for one in manifests:
        if one.step != first.step:
            raise ValueError(
                f"{folder / one.name}: of step {one.step}, but {first.name} is of {first.step}"
            )
        if one.save != first.save:
            raise ValueError(f"{folder / one.name}: of another save than {first.name}")


def check_meta_step(folder: Path, step: int, *, of: str) -> None:
    """ValueError names a folder's meta.json where it does not tell the step that `of` is of."""
    path = folder / "meta.json"
    found = read_json_object(path).get("step")
    if found != step:
        raise ValueError(f"{path}: of step {found}, but {of} is of {step}")


def _told_stages(path: Path) -> int | None:
    """What a meta.json of a save with manifests tells, else None."""
    try:
        meta = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    stages = meta.get("num_stages") if isinstance(meta, dict) and "format" in meta else None
    return stages if isinstance(stages, int) else None


def check_weights(folder: Path, *, companions: bool) -> bool:
    """Reads all that a conversion of the step in `folder` will: False where it has no manifests.

    That is the weights of all stages, meta.json, and, with `companions`, config and tokenizer.
    ValueError names the first file that is missing or not as it was written, or of another step or
    save: the folder may have any name, but its files agree.
    """
    stages = num_stages(folder)
    if stages is None:
        return False
    manifests = [read_manifest(folder, stage) for stage in range(stages)]
    check_one_save(folder, manifests)
    for one in manifests:
        one.check(folder, [part_name(one.stage, "checkpoint")])
    first = manifests[0]
    first.check(folder, first.common_files if companions else ["meta.json"])
    check_meta_step(folder, first.step, of=first.name)
    return True
