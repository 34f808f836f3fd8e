"""The manifests in a step's folder: the manifest of a stage lists all files that the stage wrote.

Every stage writes its own files and also meta.json, config and tokenizer, which are the same for
all stages. So each file that a manifest lists is in the same folder as the manifest, whether the
stages write to folders on several machines or all to one folder.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.files import checksums
from checkpoint.files.checksums import FileSum, check_file, check_size
from checkpoint.steps.meta import META, is_predecessors, read_meta


@dataclass(frozen=True)
class StageManifest:
    """The files that one stage wrote in one save.

    save: the id of the save; it is the same for all stages, and different in every other save.
    files: checksums by name, of the stage's own files and of the files that every stage writes.
    dropped: the names of files that were deleted later, to free disk space.
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
        """Returns the names of the files that every stage writes: meta.json, config, tokenizer."""
        return [name for name in self.files if not name.startswith("prank_")]

    def encode(self) -> bytes:
        """Returns the content of the manifest's file."""
        return checksums.seal({**vars(self), "files": checksums.encode_sums(self.files)})

    def check_sizes(self, folder: Path) -> None:
        """Raises ValueError if a listed file is missing in `folder` or has a wrong size."""
        for name, expected in self.files.items():
            check_size(folder / name, expected, manifest=self.name)

    def check(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Reads all listed files, or only the files `names`, and checks sizes and checksums.

        Raises ValueError for the first missing or damaged file; the text names the file.
        """
        for name in self.files if names is None else names:
            check_file(folder / name, self.files[name], manifest=self.name)


def part_name(stage: int | str, part: str) -> str:
    """Returns the name of the file that holds a part of a stage's state, such as "optimizer".

    Stage "*" gives a pattern for all stages.
    """
    return f"prank_{stage}_{part}.pt"


def manifest_name(stage: int | str) -> str:
    """Returns the file name of a stage's manifest; stage "*" gives a pattern for all stages."""
    return f"prank_{stage}_manifest.json"


def read_manifest(folder: Path, stage: int) -> StageManifest:
    """Returns the manifest of a stage; raises ValueError if it is damaged or of another stage."""
    path = folder / manifest_name(stage)
    body = checksums.unseal(path)
    if body["stage"] != stage:
        raise ValueError(
            f"{path}: belongs to stage {body['stage']}, but the name of the file has another stage"
        )
    del body["format"]
    return StageManifest(**{**body, "files": checksums.decode_sums(body)})


def count_stages(folder: Path) -> int | None:
    """Returns the number of stages that saved a step; None if a predecessor saved the step.

    A predecessor is an older system (see docs/glossary.md). The number is read from a manifest or,
    if there is no manifest, from meta.json. Raises ValueError if this file is damaged; the text
    names the file.
    """
    if manifest := first_manifest(folder):
        return manifest.num_stages
    return None if is_predecessors(folder) else len(read_meta(folder).num_layers)


def manifest_stages(folder: Path) -> list[int]:
    """Returns the stages that have a manifest in a step's folder, in order."""
    names = (path.name for path in folder.glob(manifest_name("*")))
    matches = (re.fullmatch(manifest_name("([0-9]+)"), name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def first_manifest(folder: Path) -> StageManifest | None:
    """Returns the manifest of the first stage in a step's folder, or None if there is no manifest.

    Raises ValueError if the manifest is damaged; the text names the file.
    """
    stages = manifest_stages(folder)
    return read_manifest(folder, stages[0]) if stages else None


def check_one_save(folder: Path, manifests: Sequence[StageManifest]) -> None:
    """Raises ValueError unless all manifests were written in the same save of the same step."""
    first = manifests[0]
    for manifest in manifests:
        check_step(folder / manifest.name, manifest.step, expected=first.step, owner=first.name)
        if manifest.save != first.save:
            raise ValueError(f"{folder / manifest.name}: belongs to another save than {first.name}")


def check_step(path: Path, actual: int, *, expected: int, owner: str) -> None:
    """Raises ValueError if `actual`, the step of the file `path`, is not the step `expected`.

    The error text says that `owner`, another file or the folder, is of the step `expected`.
    """
    if actual != expected:
        raise ValueError(f"{path}: belongs to step {actual}, but {owner} is of step {expected}")


def check_weights(folder: Path, *, companions: bool) -> bool:
    """Verifies all files of a step that a conversion reads.

    These files are the weights of all stages and meta.json; if `companions` is true, also config
    and tokenizer. The name of the folder is not checked, so the folder can be renamed.

    Returns:
        False for a predecessor's checkpoint, which has no manifests to verify; else True.

    Raises:
        ValueError: a file is missing, damaged, or from another save. The text names the file.
    """
    num_stages = count_stages(folder)
    if num_stages is None:
        return False
    manifests = [read_manifest(folder, stage) for stage in range(num_stages)]
    check_one_save(folder, manifests)
    for manifest in manifests:
        manifest.check(folder, [part_name(manifest.stage, "checkpoint")])
    first = manifests[0]
    first.check(folder, first.common_files if companions else [META])
    check_step(folder / META, read_meta(folder).step, expected=first.step, owner=first.name)
    return True
